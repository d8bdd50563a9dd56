"""What a difference does, through the command line: refuse and name it, notice it, or nothing at all."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from prefpipe import machine
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.score import ScoreConfig
from prefpipe.runs import store
from prefpipe.schemas import Pair, from_table, to_table
from prefpipe.stages.score import stage as score
from tests.conftest import Call
from tests.tiny import make_adapter


@dataclass(frozen=True)
class Place:
    """A run of each command to be compared with, and the files it was made from."""

    model: Path
    adapter: Path
    prompts: Path
    folder: Path


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("identity")
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about bird {i}."}) + "\n" for i in range(4)))
    return Place(model, make_adapter(model, folder / "adapter", 1), prompts, folder)


def generating(place: Place, out: Path) -> list[object]:
    return ["generate", "--model", place.model, "--adapter", place.adapter, "--prompts", place.prompts, "--engine",
            "fake", "--num-samples", 2, "--rewards", "short_sentence", "--out", out]  # fmt: skip


def scoring(place: Place, source: Path, out: Path) -> list[object]:
    return ["score", "--model", place.model, "--adapter", place.adapter, "--inputs", source, "--engine", "fake",
            "--check", 0, "--out", out]  # fmt: skip


def with_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def edited_tokenizer(place: Place, into: Path) -> Path:
    shutil.copytree(place.model, into)
    tokenizer = json.loads((into / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    (into / "tokenizer.json").write_text(json.dumps(tokenizer))
    return into


@pytest.fixture(scope="module")
def sampling_fields(place: Place, other_model: Path) -> dict[str, tuple[list[object], str]]:
    """Another value of everything that a sampled run depends on, and how the refusal names it."""
    folder = place.folder
    template = with_text(folder / "other.jinja", (place.model / "chat_template.jinja").read_text() + " ")
    more = with_text(folder / "more.jsonl", place.prompts.read_text() + '{"prompt": "One more."}\n')
    return {
        "weights": (["--model", other_model, "--adapter", "none"], "input:policy: 'weights:"),
        "adapter": (["--adapter", make_adapter(place.model, folder / "second", 2)], "+adapter:"),
        "no adapter": (["--adapter", "none"], "input:policy"),
        "tokenizer": (["--model", edited_tokenizer(place, folder / "tokenizer")], "input:tokenizer"),
        "chat template": (["--chat-template", template], "input:chat_template"),
        "prompts": (["--prompts", more], "input:prompts"),
        "rewards": (["--rewards", "tests.e2e.letters:most_letters"], "input:reward tests.e2e.letters:most_letters"),
        "reward_settings": (
            ["--rewards", "length", "--reward-settings", '{"length": {"kind": "length", "max": 3}}'],
            "input:reward length",
        ),
        "dtype": (["--dtype", "float16"], f"dtype: {machine.number_type()[0]!r} there, 'float16' now"),
        **{
            name: ([f"--{name.replace('_', '-')}", value], f"{name}: ")
            for name, value in {
                "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 9, "stop_token_ids": 9,
                "stop": "<|im_start|>",
                "seed": 1, "num_samples": 3, "reference": "base", "limit": 2, "part": "1/2", "max_prompt_tokens": 99,
                "special_tokens_in_prompts": "allow", "engine": "transformers", "chat_template_kwargs": '{"a": 1}',
                "template_changes": "allow", "thinking_marks": "none", "reward_on": "all", "column": "question=prompt",
            }.items()
        },
    }  # fmt: skip


def test_a_sampled_run_belongs_to_everything_that_made_it(
    call: Call, place: Place, sampling_fields: dict[str, tuple[list[object], str]], tmp_path: Path
) -> None:
    arguments = generating(place, tmp_path / "g")
    assert call(*arguments).code == 0
    for field, (change, named) in sampling_fields.items():
        done = call(*arguments, *change)
        assert done.code == 2, (field, done.stderr)
        assert named in done.stderr, (field, done.stderr)
        assert f"{tmp_path / 'g'} belongs to another run" in done.stderr, field
    done = call(*arguments)
    assert "is complete already" in done.stderr


def test_every_setting_of_generate_is_tried(sampling_fields: dict[str, tuple[list[object], str]]) -> None:
    """Whoever adds a setting must say here what a difference does."""
    free = {
        "shard_rows",
        "max_num_seqs",
        "kv_cache_mib",
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "template_date",
        *("workers", "cluster", "base_urls", "api_key_env", "timeout_seconds"),
    }
    tried = {
        str(flag).removeprefix("--").replace("-", "_") for change, _ in sampling_fields.values() for flag in change[::2]
    }
    assert tried | free | {"split", "check"} == set(GenerateConfig.model_fields)


def test_paths_batches_and_cadence_are_free(call: Call, place: Place, tmp_path: Path) -> None:
    """The same content under other names, other batch sizes: the same run, nothing is sampled again."""
    arguments = generating(place, tmp_path / "g")
    assert call(*arguments).code == 0
    shutil.copytree(place.model, tmp_path / "elsewhere")
    shutil.copytree(place.adapter, tmp_path / "adapter")
    shutil.copy(place.prompts, tmp_path / "renamed.jsonl")
    moved = [
        "--model",
        tmp_path / "elsewhere",
        "--adapter",
        tmp_path / "adapter",
        "--prompts",
        tmp_path / "renamed.jsonl",
    ]
    batches = ["--shard-rows", 1, "--max-num-seqs", 3, "--kv-cache-mib", 99, "--gpu-memory-utilization", 0.5]
    done = call(*arguments, *moved, *batches, "--tensor-parallel-size", 2, "--template-date", "2024-02-29")
    assert done.code == 0, done.stderr
    assert "is complete already" in done.stderr


def test_scores_belong_to_weights_adapter_and_inputs(
    call: Call, place: Place, other_model: Path, sampling_fields: dict[str, tuple[list[object], str]], tmp_path: Path
) -> None:
    """Ids that are there already: weights and adapter refuse; a tokenizer or template is worth a notice, no more."""
    assert call(*generating(place, tmp_path / "g")).code == 0
    arguments = scoring(place, tmp_path / "g", tmp_path / "s")
    assert call(*arguments).code == 0
    for field in ("weights", "adapter", "no adapter"):
        done = call(*arguments, *sampling_fields[field][0])
        assert (done.code, "input:reference: 'weights:" in done.stderr) == (2, True), (field, done.stderr)
    for field in ("tokenizer", "chat template"):
        done = call(*arguments, *sampling_fields[field][0])
        assert done.code == 0, (field, done.stderr)
        assert f"was made with another {field}: its token ids are scored as they are" in done.stderr
        assert "is complete already" in done.stderr
    done = call(*arguments, "--max-tokens-per-batch", 64, "--max-num-seqs", 2, "--shard-rows", 9)
    assert "is complete already" in done.stderr
    second = generating(place, tmp_path / "g2")
    assert call(*second, "--seed", 5).code == 0
    done = call(*scoring(place, tmp_path / "g2", tmp_path / "s"))
    assert (done.code, "input:inputs.0" in done.stderr) == (2, True), done.stderr


def test_text_is_tokenised_by_one_tokenizer_and_template(
    call: Call, place: Place, sampling_fields: dict[str, tuple[list[object], str]], tmp_path: Path
) -> None:
    path = with_text(tmp_path / "p.jsonl", json.dumps({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}))
    arguments = scoring(place, path, tmp_path / "s")
    assert call(*arguments).code == 0
    for field in ("tokenizer", "chat template"):
        change, named = sampling_fields[field]
        done = call(*arguments, *change)
        assert (done.code, named in done.stderr) == (2, True), (field, done.stderr)
    for change in (["--max-length", 99], ["--overlong", "keep_start"], ["--max-prompt-length", 50]):
        done = call(*arguments, *change)
        name = str(change[0]).removeprefix("--").replace("-", "_")
        assert (done.code, f"{name}: " in done.stderr) == (2, True), done.stderr


@pytest.fixture(scope="module")
def scored(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with the reference values of the base model in fp32, by the trainer's own forward."""
    folder = tmp_path_factory.mktemp("scored")
    rows = [{"prompt": f"Bird {i}?", "chosen": f"An owl {i}.", "rejected": f"No {i}."} for i in range(6)]
    path = with_text(folder / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    config = ScoreConfig(model=str(place.model), inputs=(str(path),), engine="transformers", dtype="float32", check=0)
    score.run(config, folder / "s", force=False)
    return folder / "s"


def training(model: Path, pairs: Path, out: Path) -> list[object]:
    return ["train", "--model", model, "--pairs", pairs, "--dtype", "float32", "--lora-r", 2, "--out", out]


def test_train_refuses_values_of_other_weights_or_ids(
    call: Call, place: Place, other_model: Path, scored: Path, tmp_path: Path
) -> None:
    done = call(*training(other_model, scored, tmp_path / "w"))
    assert (done.code, "(different: weights)" in done.stderr) == (76, True), done.stderr
    first, *others = from_table(Pair, store.read_dataset(scored, "pairs", Pair))
    edits = {
        "ids": (
            replace(first, chosen_token_ids=[*first.chosen_token_ids[:-2], 9, 2]),
            "do not match their digest",
        ),
        "values": (
            replace(first, ref_chosen_token_logps=[v + 0.5 for v in first.ref_chosen_token_logps or ()]),
            "do not belong to this model",
        ),
        "adapter": (replace(first, reference=f"{first.reference}+adapter:{'0' * 32}"), "references"),
    }
    for name, (edited, words) in edits.items():
        with store.open_run(tmp_path / name, "score", GenerateConfig(), {}, force=False) as made:
            made.write_part("pairs", Pair, 0, to_table(Pair, [edited, *others]))
            made.finish({}, {})
        done = call(*training(place.model, tmp_path / name, tmp_path / f"t-{name}"))
        assert done.code == (65 if name == "adapter" else 76), (name, done.stderr)
        assert words in done.stderr, (name, done.stderr)


def test_train_takes_the_values_whatever_the_loss_settings(
    call: Call, place: Place, scored: Path, tmp_path: Path
) -> None:
    """Beta, learning rate, rank and batch sizes have no part in a reference value: never refused, never made again."""
    changes = [
        ["--beta", 0.5], ["--learning-rate", 1e-3], ["--lora-r", 4], ["--train-batch-size", 2],
        ["--max-tokens-per-micro-batch", 64],
    ]  # fmt: skip
    for number, change in enumerate(changes):
        done = call(*training(place.model, scored, tmp_path / str(number)), *change)
        assert done.code == 0, (change, done.stderr)
        assert "no reference log-probs" not in done.stderr
        assert "the cache belongs to the reference" in done.stderr


def test_another_dtype_is_for_the_agreement_test_to_decide(
    call: Call, place: Place, scored: Path, tmp_path: Path
) -> None:
    """fp32 values, bf16 training: kernel noise passes the audit; nothing is refused by name."""
    done = call(*training(place.model, scored, tmp_path / "t"), "--dtype", "bfloat16")
    assert "different:" not in done.stderr
    assert "per token" in done.stderr
    assert done.code in (0, 76), done.stderr
