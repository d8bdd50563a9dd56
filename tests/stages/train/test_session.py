"""What rank 0 finds out is known to all; two real ranks are in `ranks`, which test_parallel runs."""

from pathlib import Path

from prefpipe.config.train import TrainConfig
from prefpipe.runs import store
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.session import Session


def test_the_leader_gets_the_run_directory(tmp_path: Path):
    with store.open_run(tmp_path / "t", "train", TrainConfig(), {"x": "y"}, force=False) as run:
        assert Session(World(0, 1), run).lead(lambda held: held.out) == tmp_path / "t"


def test_without_a_run_directory_nothing_is_done():
    done: list[object] = []
    assert Session(World(0, 1), None).lead(done.append) is None
    assert done == []
