"""Names of hub datasets, and their rows by the package `datasets` from a local folder of the same layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import MissingInputError, UsageError
from prefpipe.inputs import files, hub
from prefpipe.inputs.hub import HubDataset

ROWS = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(3)]


@pytest.mark.parametrize(("name", "parts"), [
    ("hf:o/n", HubDataset("o/n", None, None, "train")), ("hf:o/n@v1", HubDataset("o/n", "v1", None, "train")),
    ("hf:o/n:c/test", HubDataset("o/n", None, "c", "test")),
    ("hf:o/n@v1:c/train[:10]", HubDataset("o/n", "v1", "c", "train[:10]")),
])  # fmt: skip
def test_the_parts_of_a_name(name: str, parts: HubDataset) -> None:
    assert hub.parse(name) == parts
    assert hub.names_revision(name) is (parts.revision is not None)


@pytest.mark.parametrize("name", ["hf:", "hf:o", "hf:o/n@", "hf://datasets/o/n", "hf://models/o/n/a.parquet"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="names no"):
        next(hub.rows(name))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the package takes for the dataset o/n: it looks in the current directory first."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "o" / "n" / "data").mkdir(parents=True, exist_ok=True)
        rows = ROWS if split == "train" else ROWS[:1]
        (tmp_path / "o" / "n" / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.usefixtures("repository")
def test_rows_of_a_repository() -> None:
    found = list(files.rows("hf:o/n"))
    assert [row for _, row in found] == ROWS
    assert found[1][0] == "hf:o/n, row 1"
    assert [row for _, row in files.rows("hf:o/n/test", {"answer": "chosen"})] == [
        {"prompt": "0", "answer": "a", "rejected": "b"}
    ]
    with pytest.raises(MissingInputError, match="cannot read hf:o/n/nothing"):
        list(files.rows("hf:o/n/nothing"))


def test_a_file_by_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(kind: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((kind, options["data_files"]))
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load)
    urls = ["hf://datasets/o/n@v1/a.parquet", "hf://datasets/o/n@v1/a.jsonl"]
    assert [[row for _, row in files.rows(url)] for url in urls] == [ROWS, ROWS]
    assert asked == [("parquet", urls[0]), ("json", urls[1])]


def test_an_unreachable_dataset_is_a_missing_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(MissingInputError, match=r"cannot read hf://datasets/o/n@v1/a\.parquet: no route to host"):
        list(files.rows("hf://datasets/o/n@v1/a.parquet"))


def test_the_identity_is_the_name_and_a_moving_one_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert files.digest("hf:o/n@v1") == "hf:o/n@v1"
    assert capsys.readouterr().err == ""
    assert files.digest("hf:o/n") == "hf:o/n"
    assert "names no revision" in capsys.readouterr().err
