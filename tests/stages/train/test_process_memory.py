"""The kernel's figures move when memory is taken."""

from prefpipe import memory
from prefpipe.stages.train import process_memory


def test_the_peak_holds_what_was_taken_and_given_back() -> None:
    size = 64 << 20
    assert process_memory.restart_resident_peak()
    before = process_memory.resident_memory()
    taken = bytearray(b"x") * size
    assert process_memory.resident_memory() >= before + size // 2
    del taken
    process_memory.return_free_memory()
    assert process_memory.resident_memory() < before + size // 2
    assert memory.resident_peak() >= before + size // 2
