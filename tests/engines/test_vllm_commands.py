"""Commands with the real vLLM engine, in processes: killed and resumed, with two workers, and checked by the
transformers engine. They stand apart from the engine in the process, so that `make test` runs both at the same time."""

import json
from pathlib import Path

import pytest

from prefpipe import engines
from prefpipe.engines.base import EngineSettings, ScoreRequest
from prefpipe.ids import ids_digest
from prefpipe.inputs.prompts import read_prompts
from prefpipe.models.chat import load_chat
from prefpipe.models.encoding import Rules, encode_prompt
from prefpipe.models.policy import resolve
from prefpipe.runs import store
from prefpipe.schemas import Completion, RefLogps, from_table
from tests.conftest import Cli
from tests.engines.cases import distance

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's own warnings are not ours to fix


def test_generate_is_killed_resumes_and_says_when_it_is_done(
    vllm_cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """Renames: config.json, the ledger and its record, then six per shard of two prompts (3 datasets with records).

    The 13th is inside the second shard: the first one is committed and must stay as it is, byte for byte.
    """
    out = tmp_path / "g"
    command = (
        "generate", "--engine", "vllm", "--model", tiny_model, "--dtype", "float32", "--prompts", prompts_file,
        "--num-samples", 3, "--max-tokens", 12, "--shard-rows", 2, "--max-num-seqs", 4, "--kv-cache-mib", 64,
        "--out", out,
    )  # fmt: skip
    killed = vllm_cli(*command, env={"PREFPIPE_FAULT": "rename:13:kill"})
    assert killed.returncode == -9, killed.stderr
    committed = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("part-*") if p.name.startswith("part-")}
    assert any(p.name == "part-00000.ok.json" and p.parent.name == "completions" for p in committed)
    assert not (out / "manifest.json").exists()
    resumed = vllm_cli(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "18 completions of 6 prompts" in resumed.stdout
    for path in (p for p in committed if "part-00000" in p.name):
        assert (path.stat().st_mtime_ns, path.read_bytes()) == committed[path]
    check_completions(out, tiny_model, prompts_file)
    done = vllm_cli(*command)
    assert done.returncode == 0, done.stderr
    assert "is complete already" in done.stderr
    assert "starting engine" not in done.stderr


def test_score_and_its_parity_report_through_both_scorers(vllm_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """One cache by vLLM, checked by transformers, and the other way round: the same ids, the same values."""
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"Bird {i}?", "chosen": f"An owl {i}.", "rejected": f"No {i}."} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for engine in ("vllm", "transformers"):
        done = vllm_cli("score", "--model", tiny_model, "--inputs", path, "--engine", engine, "--dtype", "float32",
                   "--check", 5, "--max-length", 200, "--kv-cache-mib", 64, "--out", tmp_path / engine)  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / engine / "parity.json").read_text())
        assert (report["rows"], report["agrees"]) == (5, True)
        assert report["per_token"]["largest"] < 1e-3
        assert "parity with" in done.stdout
        logps = from_table(RefLogps, store.read_dataset(tmp_path / engine, "ref_logps", RefLogps))
        found[engine] = {r.completion_id: r.token_logps for r in logps}
    assert set(found["vllm"]) == set(found["transformers"])
    assert distance(found["vllm"], found["transformers"]) < 1e-3


def test_two_workers_share_a_model(shell: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Tensor parallel: the tiny model has two heads, one for each worker; three workers cannot share two heads."""
    arguments = ("generate", "--model", tiny_model, "--prompts", prompts_file, "--dtype", "float32", "--num-samples", 2,
                 "--max-tokens", 12, "--max-num-seqs", 4, "--kv-cache-mib", 64, "--check", 8)  # fmt: skip
    refused = shell(*arguments, "--tensor-parallel-size", 3, "--out", tmp_path / "three")
    assert refused.returncode == 2, refused.stderr
    assert "vLLM cannot start with these settings: " in refused.stderr
    assert "must be divisible by tensor parallel size (3)" in refused.stderr
    done = shell(*arguments, "--tensor-parallel-size", 2, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "two" / "parity.json").read_text())
    assert (report["rows"], report["agrees"]) == (8, True)
    assert report["per_token"]["largest"] < 1e-3


@pytest.mark.parametrize("fault", ["write:6:kill", "rename:9:kill", "fsync:13:torn"])
def test_killed_on_real_vllm_and_run_again_nothing_is_lost_or_doubled(
    vllm_cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path, fault: str
) -> None:
    """The promise for vLLM is structural: exactly the ids of an uninterrupted run, values within tolerance."""
    arguments = ("generate", "--model", tiny_model, "--prompts", prompts_file, "--dtype", "float32", "--num-samples", 3,
                 "--max-tokens", 12, "--shard-rows", 2, "--max-num-seqs", 4, "--kv-cache-mib", 64, "--out",
                 tmp_path / "g")  # fmt: skip
    killed = vllm_cli(*arguments, env={"PREFPIPE_FAULT": fault})
    assert killed.returncode == -9, killed.stderr
    done = vllm_cli(*arguments)
    assert done.returncode == 0, done.stderr
    check_completions(tmp_path / "g", tiny_model, prompts_file)
    assert json.loads((tmp_path / "g" / "parity.json").read_text())["agrees"]  # unasked: every cache carries one


def check_completions(out: Path, model: Path, prompts_file: Path) -> None:
    """Every id that the command must give, each once, with log-probs that a transformers engine agrees with."""
    chat, policy = load_chat(model), resolve(str(model))
    prompts, _ = read_prompts(prompts_file, "train", 0)
    completions = from_table(Completion, store.read_dataset(out, "completions", Completion))
    assert [(c.prompt_id, c.sample_index) for c in completions] == [(p.prompt_id, k) for p in prompts for k in range(3)]
    assert len({c.completion_id for c in completions}) == len(completions)
    prompt_ids = {p.prompt_id: encode_prompt(chat, p.messages, max_tokens=1024, rules=Rules("drop")) for p in prompts}
    assert all(c.prompt_token_ids == prompt_ids[c.prompt_id] for c in completions)
    assert all(c.ids_digest == ids_digest(c.prompt_token_ids, c.token_ids) for c in completions)
    logps = {
        r.completion_id: r.token_logps for r in from_table(RefLogps, store.read_dataset(out, "ref_logps", RefLogps))
    }
    with engines.load("transformers", EngineSettings(policy, chat, "float32", 1.0, 12, 64, 8, 64)) as engine:
        given = [ScoreRequest(c.completion_id, c.prompt_token_ids, c.token_ids) for c in completions]
        assert distance(logps, dict(engine.score(given, adapter=True))) < 1e-3
