"""`prefpipe doctor` ends without a traceback, whatever is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefpipe.doctor import command
from prefpipe.doctor.findings import Finding
from tests.conftest import ROOT
from tests.doctor.stand_ins import WHOLE, install, write

Done = subprocess.CompletedProcess[str]


def broken_check() -> list[Finding]:
    raise RecursionError("without end")


def doctor(folder: Path, *arguments: str) -> Done:
    """The command, with the packages in `folder` before all others."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "prefpipe", "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "HF_HUB_OFFLINE": "1"},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_check_that_breaks_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    checks = {"first": broken_check, "second": lambda: [Finding("second", "ok", "there")]}
    assert command.run(as_json=True, checks=checks) == 1
    said = json.loads(capsys.readouterr().out)
    assert [(f["name"], f["state"]) for f in said["findings"]] == [("first", "fail"), ("second", "ok")]
    assert command.run(as_json=False, checks={"second": checks["second"]}) == 0
    assert capsys.readouterr().out.endswith("nothing is broken\n")


def test_a_whole_installation_is_healthy(tmp_path: Path) -> None:
    install(write(tmp_path, WHOLE), "prefpipe", "9", "blake3")
    done = doctor(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok      transformers" in done.stdout


@pytest.mark.parametrize("package", ["typer", "pydantic", "rich", "packaging", "platformdirs", "vllm", "blake3"])
def test_a_broken_package_is_a_finding(tmp_path: Path, package: str) -> None:
    install(tmp_path, "prefpipe", "9", "filelock")
    write(tmp_path, {**WHOLE, f"{package}.py": "raise RuntimeError('half of a file')"})
    done = doctor(tmp_path, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    said = json.loads(done.stdout)
    ill = [finding for finding in said["findings"] if finding["state"] == "fail"]
    assert any("half of a file" in finding["what"] for finding in ill)
    assert all(finding["do"] for finding in ill)


def test_other_commands_name_the_doctor(tmp_path: Path) -> None:
    write(tmp_path, {"pydantic.py": "raise RuntimeError('half of a file')"})
    done = subprocess.run(
        [sys.executable, "-P", "-m", "prefpipe", "runs"], env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (66, "")
    assert done.stderr.splitlines() == [
        "error: the command line cannot be imported: RuntimeError: half of a file",
        "hint: `prefpipe doctor` says which package is broken",
    ]
