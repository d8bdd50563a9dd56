"""A write that fails is exit 74 with the path, whichever package was writing; any other error stays what it is."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from prefpipe.errors import DataError, StorageError
from prefpipe.runs import fsio
from prefpipe.runs.storage import storage_errors


@pytest.fixture
def little_room() -> Iterator[int]:
    """No file can grow beyond so many bytes: the kernel refuses the write, as that of a full disk does."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield 1 << 16
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [OSError, SafetensorError, RuntimeError])
def test_a_full_disk_is_said_in_one_way(tmp_path: Path, kind: type[Exception], number: int) -> None:
    error = OSError(number, os.strerror(number)) if kind is OSError else kind(f"I/O error: no room (os error {number})")
    with pytest.raises(StorageError, match=r"no space left.*x/y.*bytes free"), storage_errors(tmp_path / "x" / "y"):
        raise error


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EFBIG, errno.ESTALE])
def test_other_refusals_are_named_by_what_the_system_says(tmp_path: Path, number: int) -> None:
    for error in (OSError(number, os.strerror(number)), SafetensorError(f"I/O error (os error {number})")):
        with pytest.raises(StorageError, match=os.strerror(number)), storage_errors(tmp_path / "y"):
            raise error


@pytest.mark.parametrize("error", [ValueError("a bug"), SafetensorError("invalid header"), DataError("rows", "hint")])
def test_what_is_no_refusal_of_the_system_passes(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, storage_errors(tmp_path):
        raise error
    assert caught.value is error


def test_tensors_that_the_kernel_refuses_to_write_leave_nothing(tmp_path: Path, little_room: int) -> None:
    tensors = {"w": torch.zeros(little_room)}
    for write in (
        lambda: fsio.write_atomic(tmp_path / "w.safetensors", lambda path: save_file(tensors, path)),
        lambda: fsio.publish_dir(tmp_path / "step", lambda into: save_file(tensors, into / "state.safetensors")),
    ):
        with pytest.raises(StorageError, match="File too large") as caught:
            write()
        assert caught.value.exit_code == 74
        assert list(tmp_path.iterdir()) == []
