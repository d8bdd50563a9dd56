"""The command line of Ray, which gives a node more than the 30 seconds that Ray has for it: a busy machine needs them.

python -m tests.inference.patient_ray start ...
"""

import time
from typing import Any

from ray._private import services
from ray.scripts import scripts

START_S = 200.0
plain = services.get_node


def get_node(*arguments: Any) -> Any:
    """As Ray's, which raises RuntimeError while the node is not there."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            return plain(*arguments)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    services.get_node = get_node
    scripts.main()
