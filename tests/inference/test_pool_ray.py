"""Workers on two nodes of a Ray cluster: the same bytes, whatever ends in the middle of a run."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from prefpipe.config.generate import GenerateConfig
from prefpipe.inference.inflight import Inflight
from prefpipe.stages import build_pairs
from prefpipe.stages.build_pairs import candidates
from prefpipe.stages.generate import stage as generate
from tests.conftest import ROOT
from tests.inference.birds import contents, pairing, write_prompts

pytestmark = pytest.mark.timeout(600)  # Ray is some fifteen processes, which start one after the other

BUSY = 4  # processes that wait for each core: the runs take five minutes at 10
NAMESPACE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
# When the driver is gone its workers must be gone too, within a minute; the namespace would hide it by ending them.
SCRIPT = """
ip link set lo up
{python} -m tests.inference.cluster "$@"
echo driver $?
for i in $(seq 600); do grep -qs [p]refpipe.inference.pool_worker /proc/[0-9]*/cmdline || exit 0; sleep 0.1; done
exit 9
"""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl")


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs on the cluster left; see `cluster`."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed (make setup)")
    if not shutil.which("ip") or subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine grants no network namespace, and Ray listens on all addresses without one")
    script = SCRIPT.format(python=sys.executable)
    folder = tmp_path_factory.mktemp("ray")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as temporary:
        try:
            done = subprocess.run(
                [*NAMESPACE, "bash", "-c", script, "bash", str(tiny_model), str(prompts), str(folder), temporary],
                cwd=ROOT, capture_output=True, text=True, check=False, timeout=570,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            if os.getloadavg()[0] < BUSY * (os.cpu_count() or 1):
                raise
            pytest.skip("this machine is too busy: the runs on the cluster take more than 570 s")
    if "The current node timed out during startup" in done.stderr:
        pytest.skip("this machine is too busy: a node of Ray did not start in 200 s")
    assert "driver 137" in done.stdout, done.stderr  # 128 + SIGKILL
    assert done.returncode == 0, "workers outlive their driver"
    return folder


@pytest.fixture(scope="module")
def expected(tiny_model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("inline") / "g"
    generate.run(config(tiny_model, prompts), out, force=False)
    return contents(out)


def config(model: Path, prompts: Path) -> GenerateConfig:
    rewards = ("short_sentence",)
    return GenerateConfig(
        model=str(model), prompts=str(prompts), engine="fake", num_samples=2, rewards=rewards, shard_rows=4
    )


@pytest.mark.slow
def test_workers_on_two_nodes_write_the_same_bytes(cluster: Path, expected: dict[str, bytes]) -> None:
    assert contents(cluster / "whole") == expected


@pytest.mark.slow
def test_tasks_on_two_nodes_give_the_same_pairs(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_ROWS_PER_PARTITION", 20)
    assert build_pairs.run(pairing(cluster), tmp_path / "p", force=False)["totals"]["pairs"] > 5
    assert contents(cluster / "pairs") == contents(tmp_path / "p")


@pytest.mark.slow
def test_tasks_come_back_in_order_and_end_with_the_errors_of_build_pairs(cluster: Path) -> None:
    found = json.loads((cluster / "tasks.json").read_text())
    values, processes, folders, threads = (set(column) for column in zip(*found["doubled"], strict=True))
    assert [value for value, *_ in found["doubled"]] == sorted(values) == [0, 3, 6, 9, 12, 15]
    assert len(processes) > 1  # one on each node
    assert (folders, threads) == ({str(ROOT)}, {"1"})
    assert found["odd"] == ["DataError", "row 1 is odd", "mend it"]
    assert found["killed"][:2] == [
        "PrefpipeError", "a task on the cluster died (WorkerCrashedError): memory may be full, or its machine is gone",
    ]  # fmt: skip
    assert found["unseen"][0] == "UsageError"
    assert re.match(r"127\.0\.0\.[12] of the cluster does not see .*/nowhere", found["unseen"][1])
    assert found["others"][0] == "IdentityError"
    assert re.match(r"127\.0\.0\.[12] of the cluster has process \d+, the machine of the command", found["others"][1])


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_an_error_within_a_minute(cluster: Path) -> None:
    found = json.loads((cluster / "too_many.json").read_text())
    assert "has room for 2 workers with a CPU each on one machine, and 3" in found["message"]
    assert found["seconds"] < 60


@pytest.mark.slow
def test_a_node_that_dies_costs_its_shards_and_charges_nobody(cluster: Path, expected: dict[str, bytes]) -> None:
    """No key is on record as a killer, and no prompt is left out."""
    assert contents(cluster / "node_dies") == expected


@pytest.mark.slow
def test_a_run_whose_driver_was_killed_goes_on_in_one_process(
    cluster: Path, expected: dict[str, bytes], tiny_model: Path, prompts: Path
) -> None:
    out = cluster / "driver_dies"
    assert not (out / "manifest.json").exists()
    assert Inflight.load(out).suspects  # what was in the engines at the end
    generate.run(config(tiny_model, prompts), out, force=False)
    assert contents(out) == expected
