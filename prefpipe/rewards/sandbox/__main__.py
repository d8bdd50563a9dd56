"""`python -I sandbox 3 4`: a script of the standard library, which imports its own modules and nothing else of ours."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    judge = importlib.import_module("sandbox.judge")
    del sys.path[:2]  # this folder and the one above

    judge.main(*map(int, sys.argv[1:]))
