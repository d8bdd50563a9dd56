"""How many workers: of the GPUs, cores and memory of a machine; and what each of them gets."""

from pathlib import Path

import pytest

from prefpipe import machine
from prefpipe.errors import UsageError
from prefpipe.inference import pool_size
from prefpipe.inference.pool_size import Needs, Size, environments, size_of
from prefpipe.models.policy import Policy

GIB = 1 << 30


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    return Policy(tmp_path, None, "a", None)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, as_for_users: None) -> None:
    """Eight cores, plenty of memory, no GPU."""
    monkeypatch.setattr(pool_size, "cores", lambda: 8)
    monkeypatch.setattr(machine, "available_memory", lambda: 100 * GIB)
    monkeypatch.setattr(machine, "visible_gpus", tuple)
    monkeypatch.setattr(pool_size, "_AMD", Path("/nothing/there"))
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


def needs(shards: int = 64, tensor_parallel_size: int = 1, cache: int = GIB) -> Needs:
    return Needs(shards, tensor_parallel_size, cache, "float32")


@pytest.mark.parametrize(
    ("gpus", "each", "shards", "expected"), [(8, 1, 64, 8), (8, 2, 64, 4), (8, 1, 3, 3), (1, 2, 9, 1)]
)
def test_auto_is_one_for_each_visible_gpu_and_never_more_than_there_are_shards(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, gpus: int, each: int, shards: int, expected: int
) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: tuple(f"GPU-{i}" for i in range(gpus)))
    assert size_of("auto", "", "vllm", policy, needs(shards, each)).workers == expected


def test_each_worker_gets_gpus_of_its_own_and_its_share_of_the_cores(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: ("4", "5", "6", "7"))
    found = environments(size_of("auto", "", "vllm", policy, needs(tensor_parallel_size=2)))
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["4,5", "6,7"]
    assert [e["OMP_NUM_THREADS"] for e in found] == ["4", "4"]
    assert {e["OMP_WAIT_POLICY"] for e in found} == {"passive"}
    assert "CUDA_VISIBLE_DEVICES" not in environments(Size(2))[0]


def test_more_workers_than_the_gpus_allow_are_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: ("0", "1", "2"))
    assert size_of(3, "", "vllm", policy, needs()).workers == 3
    with pytest.raises(UsageError, match="need 4 GPUs, and 3 are visible"):
        size_of(2, "", "vllm", policy, needs(tensor_parallel_size=2))


def test_without_a_gpu_auto_is_bounded_by_cores_memory_and_work(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine is reckoned with its weights, its cache of 1 GiB and 2 GiB more: 10 GiB have room for three, or for one
    where other steps run beside it."""
    assert size_of("auto", "", "transformers", policy, needs()).workers == 8
    assert size_of("auto", "", "transformers", policy, needs(shards=7)).workers == 3
    assert size_of("auto", "", "transformers", policy, needs(shards=1)).workers == 1
    monkeypatch.setattr(machine, "available_memory", lambda: 10 * GIB)
    assert size_of("auto", "", "transformers", policy, needs()).workers == 3
    assert size_of(5, "", "transformers", policy, needs()).workers == 5
    assert size_of("auto", "", "transformers", policy, Needs(64, 1, GIB, "float32", kept=True)).workers == 1


def test_the_fake_engine_and_work_without_an_engine_have_one_unless_more_are_asked_for(policy: Policy) -> None:
    for engine, of in (("fake", policy), ("vllm", None)):
        assert size_of("auto", "", engine, of, needs()) == Size(1)
        assert size_of(3, "", engine, of, needs()) == Size(3)
    assert size_of("auto", "ray", "vllm", policy, needs(tensor_parallel_size=2)) == Size(0, "ray", 2)
