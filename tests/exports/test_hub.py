"""What arrives at a stand-in for the hub, and what is said where it refuses."""

from pathlib import Path

import pytest

from prefpipe.errors import MissingInputError, StorageError, UsageError
from prefpipe.exports import hub
from prefpipe.exports.upload import Upload, UploadFile
from tests.conftest import ROOT
from tests.exports.stand_in import TOKEN, Hub

CARD = "---\ntags: [prefpipe]\n---\n"


@pytest.fixture
def upload(tmp_path: Path) -> Upload:
    (tmp_path / "a.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "card.md").write_text("another card")
    items = [
        UploadFile("README.md", tmp_path / "card.md", CARD),
        UploadFile("x/a.safetensors", tmp_path / "a.safetensors"),
    ]
    return Upload("model", items)


def test_files_arrive_in_one_commit(standing_in: Hub, upload: Upload, tmp_path: Path) -> None:
    address = hub.send(upload, "me/policy", private=True, update=False)
    (name, repository), *others = standing_in.repositories.items()
    assert (name, others, repository.private, repository.commits) == ("models/me/policy", [], True, 1)
    assert repository.files == {
        "README.md": CARD.encode(),
        "x/a.safetensors": (tmp_path / "a.safetensors").read_bytes(),
    }
    assert address.startswith(standing_in.url)


def test_an_old_repository_takes_a_commit_where_it_is_asked_for(standing_in: Hub, upload: Upload) -> None:
    hub.send(upload, "me/policy", private=True, update=False)
    with pytest.raises(UsageError, match="me/policy exists already") as error:
        hub.send(upload, "me/policy", private=True, update=False)
    assert "--update" in error.value.hint
    with pytest.raises(UsageError, match="is private"):
        hub.send(upload, "me/policy", private=False, update=True)
    assert standing_in.repositories["models/me/policy"].commits == 1
    hub.send(upload, "me/policy", private=True, update=True)
    assert standing_in.repositories["models/me/policy"].commits == 2


def test_what_the_hub_refuses_is_one_error(standing_in: Hub, upload: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"may not write to others/policy: .*rights"):
        hub.send(upload, "others/policy", private=True, update=False)
    with pytest.raises(UsageError, match="has no me/nothing"):
        hub.send(upload, "me/nothing", private=True, update=True)
    standing_in.status = 500
    with pytest.raises(StorageError, match="failed") as failed:
        hub.send(upload, "me/policy", private=True, update=False)
    assert "--update" in failed.value.hint
    monkeypatch.setenv("HF_TOKEN", "another-token")
    with pytest.raises(UsageError, match="does not know the token") as unknown:
        hub.send(upload, "me/other", private=True, update=False)
    assert "another-token" not in unknown.value.message


def test_without_a_token_nothing_is_asked(standing_in: Hub, upload: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(MissingInputError, match="no token") as error:
        hub.send(upload, "me/policy", private=True, update=False)
    assert "HF_TOKEN" in error.value.hint
    assert standing_in.asked == []


def test_without_a_network_there_is_one_error(
    standing_in: Hub, upload: Upload, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    with pytest.raises(StorageError, match="cannot reach the hub") as error:
        hub.send(upload, "me/policy", private=True, update=False)
    assert TOKEN not in error.value.message


def test_no_other_module_sends_files() -> None:
    """Nothing uploads by itself: only `push` comes to this module, and only it may make a repository or a commit."""
    words = ("create_repo(", "create_commit(", "upload_folder(", "upload_file(", "push_to_hub(", "exports.hub")
    found = {
        str(path.relative_to(ROOT / "prefpipe"))
        for path in (ROOT / "prefpipe").rglob("*.py")
        if any(word in path.read_text() for word in words)
    }
    assert found == {"exports/hub.py", "exports/commands.py"}
