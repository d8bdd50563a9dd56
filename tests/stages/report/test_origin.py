"""What came from what, which settings were changed, and the command that makes a run again."""

import re
import shlex
from pathlib import Path

from prefpipe.config import base
from prefpipe.config.train import TrainConfig
from prefpipe.stages.report.origin import origin
from prefpipe.stages.report.subject import Subject, read


def test_lineage_by_digest(subject: Subject) -> None:
    """What a step read is what the step before it made."""
    nodes = {node.name: node for node in origin(subject).nodes}
    read = {name: {link.name: (link.digest, link.maker) for link in node.read} for name, node in nodes.items()}
    assert read["round-1/build-pairs"]["completions.0"] == (nodes["round-1/generate"].digest, "round-1/generate")
    assert read["round-1/train"]["pairs.0"] == (nodes["round-1/build-pairs"].digest, "round-1/build-pairs")
    assert read["round-2/generate"]["policy"] == ("weights:1", "round-1/train")
    assert read["round-1/generate"]["policy"] == ("weights:0", "")
    assert [link.digest for link in nodes["round-2/train"].made] == ["weights:2"]
    assert [node.state for node in nodes.values()] == ["complete"] * 9


def test_the_graph_joins_a_run_to_those_it_read(subject: Subject, finished: Path) -> None:
    """Nine runs; generate to build-pairs to train to evaluate in both rounds, and train to the next generate."""
    chart = origin(subject).graph
    assert chart is not None
    assert chart.says.startswith("9 runs")
    edges, nodes = chart.svg.split("mark-rule role-mark")[1].split("mark-symbol")
    assert edges.count("<line") == 7
    assert nodes.count('fill="var(--accent)"') == 9
    alone = origin(read(finished / "round-1/train")).graph
    assert alone is not None
    assert alone.says.startswith("3 runs")
    assert origin(read(finished / "round-1/generate")).graph is None


def test_settings_that_differ_are_marked(subject: Subject) -> None:
    (made,) = (one for one in origin(subject).runs if one.name == "round-1/train")
    changed = {one.name: (one.value, one.default) for one in made.settings if one.changed}
    assert changed["learning_rate"] == ("0.0002", "0.0")
    assert changed["loss_type"] == ("sigmoid, nll", "sigmoid")
    assert "beta" not in changed
    assert made.changed == len(changed)
    assert len(made.settings) == len(list(base.fields(TrainConfig)))


def test_the_command_replays_the_run(subject: Subject, finished: Path) -> None:
    (made,) = (one for one in origin(subject).runs if one.name == "round-1/train")
    config = finished / "round-1/train/config.json"
    assert shlex.split(made.command) == ["prefpipe", "train", str(config), "--out", "runs/replay"]
    assert base.load(TrainConfig, config, {}).learning_rate == 2e-4
    assert made.cost is not None
    assert made.cost.time == "12.5 s"
    assert re.fullmatch(r"\d\.\d\d GiB", made.cost.memory)


def test_versions_and_tables_of_iterate(subject: Subject) -> None:
    found = origin(subject)
    assert "prefpipe" in dict(found.versions)
    (root,) = (one for one in found.runs if one.name == "run")
    assert {"train.learning_rate", "generate.engine"} <= {one.name for one in root.settings if one.changed}
    assert found.gaps == []


def test_a_setting_of_another_version_is_shown(finished: Path) -> None:
    alone = read(finished / "round-1/train")
    alone.root.config["from_the_future"] = {"a": {"b": 1}}  # type: ignore[index]  # a dict that this test owns
    (made,) = (one for one in origin(alone).runs if one.name == "train")
    assert ("from_the_future.a.b", True) in [(one.name, one.changed) for one in made.settings]
