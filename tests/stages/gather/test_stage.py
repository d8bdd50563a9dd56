"""The run that gather makes of all parts is the run of one command without parts, file by file."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.score import ScoreConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.runs import store
from prefpipe.stages import build_pairs
from prefpipe.stages.evaluate import stage as evaluate
from prefpipe.stages.gather import stage as gather
from prefpipe.stages.generate import stage as generate
from prefpipe.stages.score import stage as score
from tests.conftest import Call
from tests.forge import Forge

RUNS: dict[type, Any] = {GenerateConfig: generate.run, ScoreConfig: score.run, EvaluateConfig: evaluate.run}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of which one is no prompt, one empty, one too long and one there twice."""
    rows = [{"prompt": f"Tell me about {i}.", "answer": "tool", "source": f"s{i % 3}"} for i in range(13)]
    rows[3], rows[4] = {"messages": 3}, {"prompt": ""}
    rows[7] = {"prompt": "long " * 200}
    rows[9] = rows[2]
    return write(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", *rows)


@pytest.fixture(scope="module")
def sampling(tiny_model: Path, prompts: Path) -> GenerateConfig:
    """Settings of generate with rewards, log-probs and a parity check."""
    return GenerateConfig(
        model=str(tiny_model), prompts=str(prompts), engine="fake", num_samples=3, check=4, shard_rows=3,
        rewards=("short_sentence", "repetition"), max_prompt_tokens=200,
    )  # fmt: skip


def parts(config: GenerateConfig | ScoreConfig | EvaluateConfig, folder: Path, count: int) -> list[Path]:
    """The runs of all parts."""
    for number in range(1, count + 1):
        part = config.model_copy(update={"part": f"{number}/{count}"})
        RUNS[type(config)](part, folder / f"part-{number}", force=False)
    return [folder / f"part-{number}" for number in range(1, count + 1)]


@pytest.fixture(scope="module")
def two(sampling: GenerateConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The runs of two parts."""
    return parts(sampling, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def two_scored(two: list[Path], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Their completions, scored in two parts."""
    config = ScoreConfig(
        model=str(tiny_model), inputs=tuple(map(str, two)), engine="fake", rewards=("repetition",), check=0
    )
    return parts(config, tmp_path_factory.mktemp("scored"), 2)


def contents(out: Path) -> dict[str, bytes]:
    """Every file that is no lock and no time, but for versions in the manifest."""
    skipped = (".lock", ".owner", "timing.jsonl", "inflight.log")
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in skipped}


@pytest.mark.parametrize(("count", "shard_rows", "limit"), [(2, 3, 0), (3, 0, 0), (4, 1, 0), (3, 5, 2)])
def test_the_parts_of_generate_become_one_run(
    sampling: GenerateConfig, tmp_path: Path, call: Call, count: int, shard_rows: int, limit: int
) -> None:
    """With any number of parts, also one without a prompt, and however they were cut into shards."""
    config = sampling.model_copy(update={"shard_rows": shard_rows, "limit": limit})
    generate.run(config, tmp_path / "whole", force=False)
    ended = call("gather", *reversed(parts(config, tmp_path, count)), "--out", tmp_path / "gathered")
    assert ended.code == 0, ended.stderr
    assert contents(tmp_path / "gathered") == contents(tmp_path / "whole")
    again = generate.run(config, tmp_path / "gathered", force=False)
    assert again["digest"] == store.read_manifest(tmp_path / "whole")["digest"]


@pytest.mark.parametrize(("count", "guarded", "rewards"), [(2, False, ()), (3, True, ("repetition",))])
def test_the_parts_of_evaluate_become_one_run(
    tiny_model: Path, prompts: Path, tmp_path: Path, call: Call, count: int, guarded: bool, rewards: tuple[str, ...]
) -> None:
    """Every number and every byte; what is asked for beside the answers is computed where they are gathered."""
    config = EvaluateConfig(
        model=str(tiny_model), prompts=str(prompts), engine="fake", reward=("short_sentence", *rewards), split="all",
        shard_rows=3, num_samples=2, max_prompt_tokens=200, guard=(f"{prompts}:length",) * guarded, guard_split="all",
    )  # fmt: skip
    evaluate.run(config, tmp_path / "whole", force=False)
    ended = call("gather", *parts(config, tmp_path, count), "--out", tmp_path / "gathered")
    assert ended.code == 0, ended.stderr
    assert contents(tmp_path / "gathered") == contents(tmp_path / "whole")
    assert store.read_manifest(tmp_path / "gathered") == store.read_manifest(tmp_path / "whole")


@pytest.mark.parametrize("count", [2, 3])
def test_the_parts_of_score_become_one_run_by_links(tiny_model: Path, tmp_path: Path, call: Call, count: int) -> None:
    rows = [{"prompt": f"Name bird {i % 9}.", "chosen": f"An owl {i % 4}.", "rejected": "No."} for i in range(17)]
    source = write(tmp_path / "pairs.jsonl", *rows, {"prompt": "Odd", "chosen": 1})
    config = ScoreConfig(model=str(tiny_model), inputs=(str(source),), engine="fake", shard_rows=3, check=3)
    score.run(config, tmp_path / "whole", force=False)
    ended = call("gather", *parts(config, tmp_path, count), "--out", tmp_path / "gathered")
    assert ended.code == 0, ended.stderr
    assert contents(tmp_path / "gathered") == contents(tmp_path / "whole")
    shards = [*(tmp_path / "gathered").glob("*/part-*.parquet")]
    assert shards
    assert all(shard.stat().st_nlink == 2 for shard in shards)


def test_scores_of_a_run_are_gathered_on_another_file_system(
    two_scored: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hard links the files are copies; rewards and log-probs of runs have no rows beside them."""

    def no_link(*_paths: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    saved = json.loads((two_scored[0] / "config.json").read_text())["config"]
    config = ScoreConfig.model_validate({**saved, "part": "1/1"})
    score.run(config, tmp_path / "whole", force=False)
    command, settings = gather.run(two_scored, tmp_path / "gathered", force=False)
    assert (command, settings.model_dump()["part"]) == ("score", "1/1")
    score.run(config, tmp_path / "gathered", force=False)
    assert contents(tmp_path / "gathered") == contents(tmp_path / "whole")
    assert all(p.stat().st_nlink == 1 for p in (tmp_path / "gathered").glob("*/part-*.parquet"))


def test_what_follows_takes_the_gathered_run_as_the_whole_one(
    sampling: GenerateConfig, two: list[Path], tmp_path: Path, call: Call
) -> None:
    generate.run(sampling, tmp_path / "whole", force=False)
    assert call("gather", *two, "--out", tmp_path / "gathered").code == 0
    digests: list[str] = []
    for run in ("whole", "gathered", "gathered"):
        config = BuildPairsConfig(completions=(str(tmp_path / run),), reward="short_sentence", gap_filter="none")
        digests.append(build_pairs.run(config, tmp_path / f"pairs-{run}", force=False)["digest"])
    assert len({*digests}) == 1
    assert call("show", tmp_path / "gathered").code == 0
    assert call("gather", *two, "--out", tmp_path / "gathered").stderr.count("is complete already") == 1


def test_a_damaged_shard_of_the_gathered_run_is_gathered_again(two: list[Path], tmp_path: Path, call: Call) -> None:
    out = tmp_path / "gathered"
    assert call("gather", *two, "--out", out).code == 0
    before = contents(out)
    (out / "completions" / "part-00001.parquet").write_bytes(b"damaged")
    ended = call("gather", *two, "--out", out)
    assert ended.code == 0, ended.stderr
    after = contents(out)
    assert {name: file for name, file in after.items() if not name.startswith("quarantine/")} == before
    assert "sampling" not in ended.stderr


def _missing(two: list[Path], _folder: Path) -> list[Path]:
    return two[1:]


def _twice(two: list[Path], folder: Path) -> list[Path]:
    return [*two, Path(shutil.copytree(two[0], folder / "copy"))]


def _whole(two: list[Path], folder: Path) -> list[Path]:
    saved = json.loads((two[0] / "config.json").read_text())["config"]
    generate.run(GenerateConfig.model_validate({**saved, "part": "1/1"}), folder / "whole", force=False)
    return [folder / "whole", two[1]]


def _incomplete(two: list[Path], folder: Path) -> list[Path]:
    copy = Path(shutil.copytree(two[1], folder / "copy"))
    (copy / "manifest.json").unlink()
    return [two[0], copy]


def _damaged(two: list[Path], folder: Path) -> list[Path]:
    copy = Path(shutil.copytree(two[1], folder / "copy"))
    shutil.copy(two[0] / "completions" / "part-00001.parquet", copy / "completions" / "part-00001.parquet")
    return [two[0], copy]


def _edited(two: list[Path], folder: Path) -> list[Path]:
    copy = Path(shutil.copytree(two[1], folder / "copy"))
    shutil.copy(two[0] / "config.json", copy / "config.json")
    return [two[0], copy]


def _around(two: list[Path], _folder: Path) -> list[Path]:
    return [two[0], two[1].parent]


def _of_other_versions(two: list[Path], folder: Path) -> list[Path]:
    copy = Path(shutil.copytree(two[1], folder / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["versions"]["torch"] = "0.1"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return [two[0], copy]


def _other(**changes: Any) -> Any:
    def make(two: list[Path], folder: Path) -> list[Path]:
        saved = json.loads((two[1] / "config.json").read_text())["config"]
        generate.run(GenerateConfig.model_validate({**saved, **changes}), folder / "other", force=False)
        return [two[0], folder / "other"]

    return make


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (_missing, 2, "no run of part 1/2"),
        (_twice, 2, "part 1/2 is there twice"),
        (_whole, 2, "is no part of a run of generate, score or evaluate"),
        (_incomplete, 66, "holds no complete run"),
        (_damaged, 65, "is damaged"),
        (_edited, 65, "are of two runs"),
        (_of_other_versions, 2, "'torch': '0.1'"),
        (_other(temperature=0.5), 2, "temperature: 1.0 and 0.5"),
        (_other(part="2/3"), 2, "part: 'I/2' and 'I/3'"),
        (_other(rewards=["repetition"]), 2, "input:reward short_sentence"),
    ],
)
def test_runs_that_are_not_all_parts_of_one_are_refused(
    two: list[Path], tmp_path: Path, call: Call, make: Any, code: int, words: str
) -> None:
    ended = call("gather", *make(two, tmp_path), "--out", tmp_path / "out")
    assert (ended.code, words in ended.stderr) == (code, True), ended.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("fault", ["rename:2:kill", "write:5:torn", "fsync_dir:7:enospc"])
@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_gathering_that_ends_early_is_repeated(
    two: list[Path], two_scored: list[Path], tmp_path: Path, forged: Forge, fault: str, command: str
) -> None:
    directories = two if command == "generate" else two_scored
    arguments = ("gather", *directories, "--out", tmp_path / "out")
    ended = forged.run(*arguments, fault=fault)
    assert ended.code == (74 if fault.endswith("enospc") else -signal.SIGKILL), ended.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert forged.run(*arguments).code == 0
    assert forged.run("gather", *directories, "--out", tmp_path / "undisturbed").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_out_lies_apart_from_the_parts(two: list[Path], tmp_path: Path) -> None:
    for out in (two[0], two[0] / "inside", two[0].parent):
        with pytest.raises(UsageError, match="lie in each other"):
            gather.run(two, out, force=False)


def test_an_input_that_was_changed_since_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Neither prompts that were mended nor another model make a run that no part belongs to."""
    source = write(tmp_path / "p.jsonl", *({"prompt": f"Say {i}."} for i in range(5)))
    config = GenerateConfig(model=str(tiny_model), prompts=str(source), engine="fake", num_samples=2, check=0)
    directories = parts(config, tmp_path, 2)
    write(source, *({"prompt": f"Say {i}."} for i in range(6)))
    with pytest.raises(DataError, match=r"p\.jsonl is another one than the parts were made from"):
        gather.run(directories, tmp_path / "out", force=False)
