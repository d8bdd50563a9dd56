"""Rounds through a server, by the command line: its cache is as good as one of an engine in the process."""

from pathlib import Path

import pytest

from prefpipe.runs import store
from prefpipe.schemas import Completion, RefLogps, from_table
from tests.conftest import Cli
from tests.engines.standin import Standin, running

WORDS = "tests.e2e.letters:most_letters"
SAMPLING = ("--num-samples", 3, "--max-tokens", 12, "--dtype", "float32", "--check", 4)
KEY = "sk-nobody-may-see-this-0"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "*", "VLLM_API_KEY": KEY}


def logps(run: Path) -> dict[str, list[float]]:
    rows = from_table(RefLogps, store.read_dataset(run, "ref_logps", RefLogps))
    return {row.completion_id: row.token_logps for row in rows}


def token_ids(run: Path) -> dict[str, list[int]]:
    rows = from_table(Completion, store.read_dataset(run, "completions", Completion))
    return {row.completion_id: row.token_ids for row in rows}


def test_what_a_server_sampled_passes_the_audit_of_train(
    cli: Cli, tiny_model: Path, other_model: Path, prompts_file: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """Through the same limits as a cache of the transformers engine, whose values these are; parity agrees. Against
    another model the audit refuses it."""
    g, p, t = (str(tmp_path / name) for name in "gpt")
    with running(Standin(tiny_model, room=4096)) as there:
        done = cli("generate", "--model", tiny_model, "--engine", "server", "--base-urls", there.base_url, "--prompts",
                   prompts_file, "--rewards", WORDS, *SAMPLING, "--out", g, env=env)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert KEY not in done.stderr + "".join(f.read_text() for f in Path(g).glob("*.json"))
        scored = cli("score", "--model", tiny_model, "--engine", "server", "--base-urls", there.base_url, "--inputs", g,
                     "--dtype", "float32", "--check", 4, "--out", tmp_path / "s", env=env)  # fmt: skip
        assert scored.returncode == 0, scored.stderr
        tested = cli("evaluate", "--model", tiny_model, "--engine", "server", "--base-urls", there.base_url, "--reward",
                     WORDS, "--prompts", prompts_file, "--max-tokens", 12, "--dtype", "float32", "--out",
                     tmp_path / "e", env=env)  # fmt: skip
        assert tested.returncode == 0, tested.stderr
    manifest = store.read_manifest(Path(g))
    assert manifest["totals"]["completions"] == 18
    assert manifest["totals"]["parity"]["agrees"]
    assert manifest["totals"]["parity"]["scorer"] == "server:vllm-0.32.0/float32"
    captured, again = (logps(Path(run)) for run in (g, tmp_path / "s"))
    assert captured.keys() == again.keys()
    assert max(abs(a - b) for k in captured for a, b in zip(captured[k], again[k], strict=True)) < 1e-3
    assert token_ids(Path(g)).keys() == captured.keys()
    done = cli("build-pairs", "--completions", g, "--reward", WORDS, "--truncated-chosen", "keep", "--out", p)
    assert done.returncode == 0, done.stderr
    train = ("train", "--pairs", p, "--dtype", "float32", "--num-train-epochs", 1)
    done = cli(*train, "--model", tiny_model, "--out", t, env=env)
    assert done.returncode == 0, done.stderr
    assert "the cache belongs to the reference" in done.stderr
    assert store.read_manifest(Path(t))["totals"]["audit"]["absolute_mean"] < 1e-3
    done = cli(*train, "--model", other_model, "--out", tmp_path / "u", env=env)
    assert done.returncode == 76


def test_a_run_whose_server_gets_other_weights_ends_and_resumes_with_the_right_one(
    cli: Cli, tiny_model: Path, other_model: Path, prompts_file: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """Exit 76, nothing of the other weights in the run, and the end is that of a run without the swap."""
    standin = Standin(tiny_model, other_model, room=4096)
    command = ("generate", "--model", tiny_model, "--engine", "server", "--prompts", prompts_file, *SAMPLING,
               "--shard-rows", 1, "--max-num-seqs", 1)  # fmt: skip
    with running(standin) as there:
        asked: list[int] = []

        def swap(request: object) -> bool:
            asked.append(1)
            if len(asked) == 36:
                standin.lies.add("swapped")
            return False

        standin.refuse = swap
        done = cli(*command, "--base-urls", there.base_url, "--out", tmp_path / "g", env=env)
        assert (done.returncode, "holds other weights" in done.stderr) == (76, True), done.stderr
        assert not (tmp_path / "g" / "manifest.json").exists()
        standin.lies.clear()
        for out in ("g", "whole"):
            done = cli(*command, "--base-urls", there.base_url, "--out", tmp_path / out, env=env)
            assert done.returncode == 0, done.stderr
    assert token_ids(tmp_path / "g") == token_ids(tmp_path / "whole")
