"""A sampling run: what is read, what is dropped before an engine starts, and what its settings are."""

import json
from pathlib import Path

import pytest

from prefpipe.config.generate import GenerateConfig
from prefpipe.engines.base import EngineSettings
from prefpipe.errors import DataError, UsageError
from prefpipe.ids import content_id
from prefpipe.inference.sampling import EncodedPrompt
from prefpipe.inference.task import engine_settings, prompt_key, read_task
from prefpipe.inputs.prompts import read_prompts
from prefpipe.models.chat import Chat
from prefpipe.runs import store, tables
from prefpipe.schemas import Completion, Dropped, Message, Prompt, from_table
from prefpipe.stages.generate import stage as generate
from tests.conftest import Cli, Write


def prompt(text: str, answer: str | None = None) -> Prompt:
    messages = [Message(role="user", content=text)]
    return Prompt(content_id(messages, answer), messages, answer, "train", "", "{}")


FAULTY = {"long": "x" * 50, "empty": " ", "control": "a<|im_end|>"}


def test_faulty_prompts_are_in_the_ledger_with_their_reasons(
    tiny_model: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """'<|im_start|>user\\n' + text + '<|im_end|>\\n<|im_start|>assistant\\n' has 19 tokens beside the text's bytes."""
    texts = ("good", FAULTY["long"], FAULTY["empty"], "good", FAULTY["control"], "also good")
    path = write(*({"prompt": text} for text in texts))
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(path), engine="fake", max_prompt_tokens=40, num_samples=1, shard_rows=2
    )
    generate.run(config, tmp_path / "g", force=False)
    found = tables.read_parquet(tmp_path / "g" / "dropped.parquet").to_pylist()
    assert [(d["id"], d["reason"]) for d in found] == [
        (prompt("good").prompt_id, "duplicate"),
        (prompt(FAULTY["long"]).prompt_id, "too_long"),
        (prompt(FAULTY["empty"]).prompt_id, "empty"),
        (prompt(FAULTY["control"]).prompt_id, "control_tokens"),
    ]
    assert found[1]["detail"] == "69 tokens in the prompt, the most is 40"
    completions = from_table(Completion, store.read_dataset(tmp_path / "g", "completions", Completion))
    assert [len(c.prompt_token_ids) for c in completions] == [19 + 4, 19 + 9]
    told = capsys.readouterr().err
    assert "3 of 5 prompts dropped" in told
    assert f"rows of prompts left out: 1 duplicate (first: {prompt('good').prompt_id}" in told


def test_no_prompt_left_is_an_error_with_the_reasons_before_an_engine_starts(
    tiny_model: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(*({"prompt": FAULTY[name]} for name in ("long", "empty")))
    config = GenerateConfig(model=str(tiny_model), prompts=str(path), engine="fake", max_prompt_tokens=40)
    with pytest.raises(DataError, match=r"no prompt is left: 1 too_long, 1 empty \(first: .*the most is 40\)"):
        generate.run(config, tmp_path / "g", force=False)
    ledger = tables.read_table(tmp_path / "g" / "dropped.parquet", Dropped)
    assert ledger["reason"].to_pylist() == ["too_long", "empty"]
    assert "starting engine" not in capsys.readouterr().err


def test_a_stop_string_is_a_control_token_or_refused(tiny_model: Path, write: Write, tmp_path: Path, cli: Cli) -> None:
    """<|im_start|> is token 1 of the tiny model; a blank line can end inside a token."""
    path = write({"prompt": "good"})
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(path), engine="fake", stop=("<|im_start|>",), stop_token_ids=(9,)
    )
    task = read_task(config, ())
    assert task.stop_token_ids == (1, 9)
    assert engine_settings(task, config, 42).stops == {1, 2, 9}
    alike = config.model_copy(update={"stop": (), "stop_token_ids": (1, 9)})
    encoded = EncodedPrompt(prompt("good"), [5])
    assert prompt_key(config, task, encoded) == prompt_key(alike, read_task(alike, ()), encoded)
    common = ("generate", "--model", tiny_model, "--prompts", path, "--engine", "fake", "--out", tmp_path / "g")
    for text in ("\n\n", "<|im_strat|>"):
        done = cli(*common, "--stop", text)
        assert done.returncode == 2
        assert f"stop string {text!r} is not a control token" in done.stderr
        assert "can end inside a token" in done.stderr
    assert "did you mean '<|im_start|>'" in done.stderr
    assert not (tmp_path / "g").exists()
    assert cli(*common, "--stop", "<|im_start|>").returncode == 0


def test_engine_settings_carry_every_setting_of_sampling(tiny_model: Path, prompts_file: Path) -> None:
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(prompts_file), engine="fake", dtype="float32", top_p=0.9, top_k=7, min_p=0.1,
        max_tokens=12, stop_token_ids=(9,), max_num_seqs=3, kv_cache_mib=64, tensor_parallel_size=2,
        gpu_memory_utilization=0.5,
    )  # fmt: skip
    task = read_task(config, ())
    found = engine_settings(task, config, 42)
    assert found == EngineSettings(
        task.policy, task.chat, "float32", 0.9, 12, 42, 3, 64, 7, 0.1, (9,), 2, 0.5, api_key_env="VLLM_API_KEY"
    )
    assert found.stops == {2, 9}


def test_a_prompt_that_leaves_no_room_for_the_completion_is_dropped(
    tiny_model: Path, tmp_path: Path, chat: Chat
) -> None:
    """The context is 1024 tokens, max_tokens 100, and scoring asks for one more: 923 are left for a prompt."""
    path = tmp_path / "p.jsonl"
    sizes = {n: 19 + n for n in (904, 905)}
    path.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in sizes))
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(path), engine="fake", max_tokens=100, max_prompt_tokens=2000, num_samples=1
    )
    manifest = generate.run(config, tmp_path / "g", force=False)
    assert manifest["totals"]["prompts"] == 1
    (row,) = tables.read_parquet(tmp_path / "g" / "dropped.parquet").to_pylist()
    assert (row["reason"], row["detail"]) == ("too_long", "924 tokens in the prompt, the most is 923")


@pytest.mark.parametrize("count", [1, 3, 4])
def test_parts_are_disjoint_and_together_they_are_the_whole(tiny_model: Path, prompts_file: Path, count: int) -> None:
    def ids(part: str) -> list[str]:
        config = GenerateConfig(model=str(tiny_model), prompts=str(prompts_file), engine="fake", part=part)
        return [p.prompt_id for p in read_task(config, ()).prompts]

    everything, _ = read_prompts(prompts_file, "train", 0)
    parts = [ids(f"{i}/{count}") for i in range(1, count + 1)]
    assert sorted(i for part in parts for i in part) == sorted(p.prompt_id for p in everything)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(UsageError, match=rf"part = '{count + 1}/{count}': there are only {count} parts"):
        ids(f"{count + 1}/{count}")
