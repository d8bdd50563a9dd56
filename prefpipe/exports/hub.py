"""The only module that sends files anywhere: a new repository of the hub, or one more commit in an old one.

The token is that of huggingface_hub: HF_TOKEN, or what `hf auth login` left. Nothing here shows it.
"""

import importlib.util
import sys
from typing import Any

from prefpipe import extras
from prefpipe.config import secrets
from prefpipe.errors import MissingInputError, PrefpipeError, StorageError, UsageError
from prefpipe.exports.upload import Upload

_ENDED = "nothing is lost here: run the same command again, with --update where the repository was made already"


def send(upload: Upload, repository: str, *, private: bool, update: bool) -> str:
    """Put all files of an upload into a repository, in one commit. Returns the address of the commit.

    Without `update` the repository (OWNER/NAME) is made, and must not exist; with it, it must, and be private or public
    as `private` says. Raises MissingInputError without the package or a token, UsageError where the hub refuses,
    StorageError where it does not answer.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingInputError("push needs the package huggingface_hub", extras.hint("train"))
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    token = huggingface_hub.get_token()
    if not token:
        raise MissingInputError(
            "there is no token of the hub", "set HF_TOKEN to one that may write, or log in with `hf auth login`"
        )
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = huggingface_hub.HfApi(token=token)
    operations = [
        huggingface_hub.CommitOperationAdd(file.name, str(file.path) if file.text is None else file.text.encode())
        for file in upload.files
    ]
    try:
        if update:
            _check_visibility(api, upload, repository, private=private)
        else:
            api.create_repo(repository, repo_type=upload.kind, private=private)
        done = api.create_commit(
            repository, operations, commit_message="Pushed by prefpipe", repo_type=upload.kind, num_threads=2
        )
    except PrefpipeError:
        raise
    except Exception as error:  # whatever the client and its transports raise
        raise _explained(error, repository, token) from error
    return str(done.commit_url)


def _check_visibility(api: Any, upload: Upload, repository: str, *, private: bool) -> None:
    there = bool(api.repo_info(repository, repo_type=upload.kind).private)
    if there != private:
        raise UsageError(
            f"{repository} is {'private' if there else 'public'}", f"say so: --{'private' if there else 'public'}"
        )


def _explained(error: Exception, repository: str, token: str) -> PrefpipeError:
    """The error to raise for an answer of the hub, or for a failure on the way there, with a hint."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    said = str(getattr(error, "server_message", "") or error).replace(token, "***")
    said = " ".join(str(secrets.masked(said)).split())[:300]
    if status == 401:
        return UsageError(f"the hub does not know the token: {said}", "set HF_TOKEN to a valid one")
    if status == 403:
        return UsageError(
            f"the token may not write to {repository}: {said}", "use a token with write access, or another OWNER"
        )
    if status == 404:
        return UsageError(
            f"the hub has no {repository} that this token sees: {said}", "leave out --update to make it, or check it"
        )
    if status == 409:
        return UsageError(f"{repository} exists already", "--update adds a commit to it; or choose another name")
    if 400 <= status < 500 or isinstance(error, ValueError):
        return UsageError(f"the hub refuses {repository}: {said}", "check the name and the card")
    return StorageError(f"cannot reach the hub, or it failed: {said}", f"check the network; {_ENDED}")
