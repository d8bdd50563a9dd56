"""A `prefpipe` for scripts."""

import json
import socketserver
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from tests.forge import Forge

CLIENT = """#!{python} -SE
import json, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect({address!r})
    s.sendall((json.dumps(sys.argv[1:]) + "\\n").encode())
    ended = json.loads(s.makefile().read())
sys.stdout.write(ended["stdout"])
sys.stderr.write(ended["stderr"])
sys.exit(ended["code"])
"""


@pytest.fixture(scope="session")
def prefpipe(forged: Forge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A `prefpipe` whose commands are forked from one process that has imported torch already."""
    address = str(tmp_path_factory.mktemp("s") / "s")

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            ended = forged.run(*json.loads(self.rfile.readline()))
            self.wfile.write(json.dumps(asdict(ended)).encode())

    with socketserver.UnixStreamServer(address, Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield CLIENT.format(python=sys.executable, address=address)
        server.shutdown()
        thread.join()
