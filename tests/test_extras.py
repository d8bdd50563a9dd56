"""The command that installs a part of prefpipe belongs to the place that this installation came from."""

import json
from pathlib import Path

import pytest

from prefpipe import extras
from tests.doctor.stand_ins import install, write


@pytest.mark.parametrize(
    ("asked", "ends"),
    [
        (("train",), " setup"),
        (("train", "embedded"), " setup"),
        (("cluster",), " setup"),
        (("cuda",), " setup LOCK=cuda"),
        (("hub",), "[hub]"),
        (("train", "bnb"), "[train,bnb]'"),
    ],
)
def test_a_checkout_is_set_up_by_its_makefile_as_far_as_its_locks_go(
    tmp_path: Path, asked: tuple[str, ...], ends: str
) -> None:
    (tmp_path / "pyproject.toml").touch()
    command = extras.command(*asked, root=tmp_path)
    assert command.rstrip("'").endswith(ends.rstrip("'"))
    assert command.startswith("make -C " if "setup" in ends else "pip install -e ")
    assert str(tmp_path) in command


@pytest.mark.parametrize(
    ("record", "place"),
    [
        (None, ""),
        ({"url": "file:///tmp/prefpipe-1-py3-none-any.whl", "archive_info": {}}, " @ file:///tmp/prefpipe-1-py3-none-any.whl"),
        ({"url": "https://host/x.git", "vcs_info": {"vcs": "git"}}, " @ git+https://host/x.git"),
        ("not JSON", ""),
        ([], ""),
    ],
)  # fmt: skip
def test_an_installed_package_is_extended_from_where_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: object, place: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "prefpipe", "9", "owl", 'kettle==1; extra == "embedded"', 'harp; extra == "hub"')
    if record is not None:
        text = record if isinstance(record, str) else json.dumps(record)
        write(tmp_path, {"prefpipe-9.dist-info/direct_url.json": text})
    assert extras.command("hub", root=tmp_path) == f"pip install 'prefpipe[hub]{place}'"
    model = "pip install --no-deps kettle==1"
    assert extras.command("embedded", root=tmp_path) == model
    assert extras.command("train", "embedded", root=tmp_path) == f"pip install 'prefpipe[train]{place}' && {model}"
    assert extras.hint("hub").startswith("install it with: pip install ")
