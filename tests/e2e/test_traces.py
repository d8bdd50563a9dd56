"""Agent traces from a file to training: only what the assistant says is scored, wherever a number is made of tokens."""

import json
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from prefpipe.forward import load
from prefpipe.forward.logps import TreeModel
from prefpipe.models.chat import load_chat
from prefpipe.runs import store, tables
from prefpipe.schemas import (
    Completion,
    Dropped,
    KlBank,
    Label,
    Pair,
    RankedGroup,
    RefLogps,
    Reward,
    from_table,
    to_table,
)
from prefpipe.stages.train import examples
from prefpipe.stages.train.loss_batches import to_loss_batch
from prefpipe.stages.train.losses import registry
from prefpipe.stages.train.micro_batches import micro_batches
from tests.conftest import Call, Write
from tests.inputs.cases import ASK, LONG, MARKED, SHORT, TOOLS, TRACE, calling, read_pairs, result, said
from tests.runs.cases import rewrite
from tests.stages.train import data

WRONG = [calling("Oslo"), result("not found"), calling("Lund"), result("rain"), said("No.")]
TRACES = [
    {"prompt": [ASK], "tools": TOOLS, "chosen": TRACE, "rejected": SHORT},
    {"prompt": [ASK], "tools": TOOLS, "chosen": LONG, "rejected": "I do not know."},
    {"chosen": [ASK, *TRACE], "rejected": [ASK, *WRONG], "tools": TOOLS},
]
RATED = [
    {
        "prompt": f"Does it rain in {town}?",
        "tools": TOOLS,
        "completions": [TRACE, SHORT, "No idea."],
        "ratings": [3, 1, 2],
    }
    for town in ("Lund", "Kiel", "Oslo")
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "marked.jinja"
    path.write_text(MARKED)
    return path


@pytest.fixture
def score(call: Call, tiny_model: Path, template: Path) -> Any:
    def run(inputs: Path, out: Path, *arguments: object) -> Path:
        done = call(
            *("score", "--model", tiny_model, "--inputs", inputs, "--out", out, "--dtype", "float32"),
            *("--engine", "fake", "--chat-template", template, *arguments),
        )
        assert done.code == 0, done.stderr
        return out

    return run


@pytest.fixture
def train(call: Call, tiny_model: Path, template: Path, tmp_path: Path) -> Any:
    def run(*arguments: object, code: int = 0) -> Any:
        out = tmp_path / f"trained-{len(list(tmp_path.iterdir()))}"
        done = call(
            *("train", "--model", tiny_model, "--dtype", "float32", "--num-train-epochs", 1, "--train-batch-size", 2),
            *("--chat-template", template, "--out", out, *arguments),
        )
        assert done.code == code, done.stderr
        return json.loads((out / "manifest.json").read_text()) if code == 0 else done

    return run


def read(run: Path, name: str, row_type: type) -> list[Any]:
    return from_table(row_type, store.read_dataset(run, name, row_type))


def sides(pair: Pair) -> list[tuple[list[int], list[bool], list[float]]]:
    """Token ids, mask and reference log-probs of both completions."""
    return [
        (ids, mask or [True] * len(ids), values or [])
        for ids, mask, values in (
            (pair.chosen_token_ids, pair.chosen_loss_mask, pair.ref_chosen_token_logps),
            (pair.rejected_token_ids, pair.rejected_loss_mask, pair.ref_rejected_token_logps),
        )
    ]


def test_log_probs_are_those_of_the_assistants_tokens(
    score: Any, write: Write, tiny_model: Path, tmp_path: Path
) -> None:
    """Against one plain forward pass of transformers for each answer; the fake engine and a second run over the pairs
    score the same tokens."""
    path = write(*TRACES)
    out = score(path, tmp_path / "s", "--engine", "transformers", "--check", 0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    pairs = read(out, "pairs", Pair)
    assert [(p.chosen_loss_mask is None, p.rejected_loss_mask is None) for p in pairs] == [
        (False, False), (False, True), (False, False)
    ]  # fmt: skip
    for pair in pairs:
        for ids, mask, values in sides(pair):
            expected = list(compress(token_logps(model, pair.prompt_token_ids, ids).tolist(), mask))
            assert values == pytest.approx(expected, abs=1e-5)
        assert pair.ref_chosen_logps == pytest.approx(sum(sides(pair)[0][2]), abs=1e-4)
    cached = {row.completion_id: row for row in read(out, "ref_logps", RefLogps)}
    for completion in read(out, "completions", Completion):
        assert cached[completion.completion_id].num_tokens == sum(
            completion.loss_mask or (completion.token_ids and [True] * len(completion.token_ids))
        )
        assert cached[completion.completion_id].ids_digest == completion.ids_digest
    manifest = store.read_manifest(out)
    assert manifest["totals"]["tokens"] == sum(row.num_tokens for row in cached.values())
    again = score(out, tmp_path / "again", "--engine", "transformers", "--check", 0)
    assert {row.completion_id: row for row in read(again, "ref_logps", RefLogps)} == cached
    fake = score(path, tmp_path / "f", "--check", 32)
    assert store.read_manifest(fake)["totals"]["tokens"] == manifest["totals"]["tokens"]
    assert store.read_manifest(fake)["totals"]["parity"]["per_token"]["count"] == manifest["totals"]["tokens"]


def token_logps(model: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Log-probs [N] of all tokens of a completion, by transformers."""
    logps = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)


def test_the_gradient_of_a_loss_of_means_is_that_of_the_assistants_tokens(
    write: Write, tiny_model: Path, template: Path
) -> None:
    """SimPO divides each side by its length: here the number of scored tokens. Against transformers."""
    rows, dropped = read_pairs(write(*TRACES), load_chat(tiny_model, str(template)))
    assert not dropped
    settings = data.config(tiny_model, loss_type=("simpo",), beta=2.0, simpo_gamma=0.5).objective
    model = TreeModel(load.load_model(tiny_model, "float32"))
    for parameter in model.parameters():
        parameter.requires_grad_()
    (micro,) = micro_batches(examples.from_pairs(rows), 10**6)
    layout = model.layout(micro.trees)
    batch, _ = to_loss_batch(model(layout), layout, micro, settings.settings)
    registry.combine(settings, batch).sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loss = torch.zeros(())
    for row in rows:
        means = [
            token_logps(plain, row.prompt_token_ids, ids)[torch.tensor(mask)].mean() for ids, mask, _ in sides(row)
        ]
        loss = loss - logsigmoid(2.0 * (means[0] - means[1]) - 0.5)
    loss.backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plain))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_training_takes_pairs_with_and_without_a_cache(score: Any, train: Any, write: Write, tmp_path: Path) -> None:
    """The audit re-scores the same tokens; held-out rows are evaluated on them too; lengths count them."""
    path = write(*TRACES)
    run = score(path, tmp_path / "s", "--engine", "transformers", "--check", 0)
    lengths = [[sum(mask) for _, mask, _ in sides(pair)] for pair in read(run, "pairs", Pair)]
    scored = sum(map(sum, lengths))
    manifest = train("--pairs", run, "--eval-pairs", run, "--eval-steps", 1)
    assert manifest["totals"]["audit"]["tokens"] == 2 * scored  # of rows to train on and to evaluate on
    assert manifest["totals"]["audit"]["largest_h"] < 1e-3
    for side, counts in zip(("chosen", "rejected"), zip(*lengths, strict=True), strict=True):
        assert manifest["totals"]["last_step"][f"eval_lengths/{side}"] == pytest.approx(sum(counts) / len(counts))
    without = train("--pairs", path)
    assert without["totals"]["audit"]["tokens"] == scored


def test_a_cache_of_another_mask_is_refused(score: Any, train: Any, write: Write, tmp_path: Path) -> None:
    """As a run of other marks it has other completions; edited rows do not match their digest."""
    path = write(TRACES[0], TRACES[2])
    run = score(path, tmp_path / "s", "--check", 0)
    wider = tmp_path / "wider.jinja"
    tools = "{% else %}{% generation %}{{ m.content }}{% endgeneration %}"
    wider.write_text(MARKED.replace("{% else %}{{ m.content }}", tools))
    other = score(path, tmp_path / "o", "--check", 0, "--chat-template", wider)
    one, two = read(run, "pairs", Pair), read(other, "pairs", Pair)
    assert [p.chosen_token_ids for p in one] == [p.chosen_token_ids for p in two]
    assert not {p.chosen_completion_id for p in one} & {p.chosen_completion_id for p in two}
    bare = score(path, tmp_path / "b", "--check", 0, "--reference", "none")
    done = train("--pairs", bare, "--ref-logps", other, code=65)
    assert "has log-probs in" in done.stderr
    rewrite(run, "pairs/part-00000.parquet", inverted)
    done = train("--pairs", run, code=76)
    assert "do not match their digest" in done.stderr


def inverted(table: pa.Table) -> pa.Table:
    """The pairs with every mask of a chosen side turned round."""
    rows = [
        replace(row, chosen_loss_mask=[not scored for scored in row.chosen_loss_mask or []])
        for row in from_table(Pair, table)
    ]
    return to_table(Pair, rows)


def test_from_ratings_to_pairs_labels_groups_and_training(
    score: Any, train: Any, call: Call, write: Write, tmp_path: Path
) -> None:
    run = score(write(*RATED), tmp_path / "s", "--engine", "transformers", "--check", 0, "--rewards", "length",
                "--reward-settings", '{"length": {"kind": "length", "max": 2}}')  # fmt: skip
    masks = {c.completion_id: c.loss_mask for c in read(run, "completions", Completion)}
    rewards = read(run, "rewards/length", Reward)
    assert [row.reward for row in rewards] == [1.0] * len(rewards)  # of the last answer: "Yes.", "No.", "No idea."
    outputs = {
        "pairs": ("--gap-filter", "none"),
        "labels": ("--label-rule", "threshold", "--label-threshold", 1.5),
        "groups": (),
    }
    for output, arguments in outputs.items():
        done = call(
            *("build-pairs", "--completions", run, "--reward", "rating", "--output", output, *arguments),
            *("--out", tmp_path / output),
        )
        assert done.code == 0, done.stderr
    (pair, *_) = read(tmp_path / "pairs", "pairs", Pair)
    assert pair.chosen_loss_mask == masks[pair.chosen_completion_id]
    assert pair.rejected_loss_mask == masks[pair.rejected_completion_id]
    assert [len(pair.chosen), len(pair.ref_chosen_token_logps or [])] == [3, sum(pair.chosen_loss_mask or [])]
    for label in read(tmp_path / "labels", "labels", Label):
        assert label.loss_mask == masks[label.completion_id]
    bank = read(tmp_path / "labels", "kl_bank", KlBank)
    assert [row.loss_mask for row in bank] == [masks[row.completion_id] for row in bank]
    for group in read(tmp_path / "groups", "groups", RankedGroup):
        every = [
            masks[key] or [True] * len(ids) for key, ids in zip(group.completion_ids, group.token_ids, strict=True)
        ]
        assert group.loss_masks == every
        assert [len(values) for values in group.ref_token_logps or []] == list(map(sum, every))
    train("--pairs", tmp_path / "pairs")
    train("--labels", tmp_path / "labels", "--loss-type", "kto")
    train("--groups", tmp_path / "groups", "--loss-type", "plackett_luce")
    refused = call(
        "build-pairs", "--completions", run, "--reward", "rating", "--format", "trl", "--out", tmp_path / "t"
    )
    assert refused.code == 65
    assert "TRL would score what tools and users say in them" in refused.stderr


def test_traces_to_imitate(train: Any, write: Write, tmp_path: Path) -> None:
    """The mean NLL of a step is over the assistant's tokens."""
    sft = write({"prompt": [ASK], "messages": [ASK, *TRACE], "tools": TOOLS}, name="sft.jsonl")
    manifest = train("--pairs", write(*TRACES), "--sft", sft, "--sft-batch-size", 1)
    with_mask = manifest["totals"]["last_step"]["sft/tokens"]
    said_by_assistant = '{"name": "weather", "arguments": {"town": "Lund"}}' + "Yes."
    assert with_mask == len(said_by_assistant) + 2  # a byte is a token; two turns end


def test_without_marks_every_trace_is_in_the_ledger(call: Call, tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = write(*TRACES, {"prompt": "Hi", "chosen": "a", "rejected": "b"})
    for command in (("score", "--inputs", path, "--engine", "fake", "--check", 0), ("train", "--pairs", path)):
        out = tmp_path / str(command[0])
        assert call(command[0], "--model", tiny_model, "--out", out, *command[1:]).code == 0
        dropped = from_table(Dropped, tables.read_table(out / "dropped.parquet", Dropped))
        assert [row.reason for row in dropped] == ["several_turns"] * 3
        assert "--chat-template FILE" in dropped[0].detail
    done = call("score", "--model", tiny_model, "--inputs", write(*TRACES), "--engine", "fake", "--out", tmp_path / "n")
    assert done.code == 65
    assert "3 several_turns" in done.stderr
    assert "{% generation %} marks" in done.stderr
