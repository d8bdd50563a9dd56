"""What editors know of `import prefpipe` is what it has, and a type checker finds mistakes by it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import prefpipe
from tests.conftest import ROOT
from tests.meta.stub import PATH_OF_STUB, stub

USE = """
import prefpipe
run = prefpipe.train(loss_type="ipo", pairs=prefpipe.load("p"), learning_rate=1e-6, out="t")
reveal_type(run)
reveal_type(run.metrics)
prefpipe.train(betta=1, out="t")
prefpipe.train(optim="sgd", out="t")
prefpipe.iterate("r.toml", train={"beta": 0.1, "betta": 1}, out="r")
"""


def test_it_is_that_of_today() -> None:
    assert ast.dump(ast.parse(PATH_OF_STUB.read_text())) == ast.dump(ast.parse(stub())), "run `make fix`"
    defined = {n.name for n in ast.parse(stub()).body if isinstance(n, ast.FunctionDef)}
    assert defined == set(prefpipe.__all__) - {"PrefpipeError", "Run"}


@pytest.mark.slow
def test_a_type_checker_completes_and_refuses(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.is_file():
        pytest.skip("pyright is not installed")
    done = subprocess.run(
        [pyright, "--outputjson", "--pythonpath", sys.executable, "-p", tmp_path], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    said = {line["range"]["start"]["line"] + 1: line["message"] for line in found}
    assert 'is "Run"' in said[4]
    assert 'is "DataFrame"' in said[5]
    assert 'No parameter named "betta"' in said[6]
    assert "'sgd'" in said[7]
    assert '"betta" is an undefined item in type "TrainSettings"' in said[8]
    assert 3 not in said
