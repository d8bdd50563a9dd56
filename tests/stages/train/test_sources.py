"""Rows to imitate beside the pairs: the gradient against a plain NLL, budgets, a resume, files; sources with weights
against files that were put together by hand."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from prefpipe.config.train import TrainConfig
from prefpipe.runs import store
from prefpipe.schemas import Pair
from prefpipe.stages.train import loop, plan
from prefpipe.stages.train.examples import TrainCompletion, TrainLabel, TrainPair
from prefpipe.stages.train.mixing import sft_rows
from tests.conftest import Call, Write
from tests.stages.train import data
from tests.stages.train.runs import adapter, metrics

SFT = [{"prompt": f"Name the number {n}.", "completion": "It is " + "so " * n + "n."} for n in range(5)]


@pytest.fixture(scope="module")
def train_pairs(rows: list[Pair]) -> list[TrainPair]:
    return data.to_train_pairs(rows)


@pytest.fixture(scope="module")
def answers() -> list[TrainLabel]:
    """Answers of 3 to 11 tokens to three prompts; two of them answer the same prompt."""
    pairs = data.bare_pairs(4, num_prompts=3, seed=7)
    return [
        TrainLabel(
            p.pair_id, tuple(p.prompt_token_ids), TrainCompletion("c", tuple(p.chosen_token_ids), None), None, 1.0
        )
        for p in pairs
    ]


def gradient(
    model_directory: Path, config: TrainConfig, pairs: Sequence[TrainPair], answers: Sequence[TrainLabel]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The unclipped gradient of step 0 (Adam's first moment is a tenth of it), and the metrics."""
    started = data.trainer(data.policy(model_directory), config.model_copy(update={"max_grad_norm": 1e9}))
    values = next(loop.steps(started, pairs, 0, (), answers)).values
    moments = [v.flatten() for k, v in sorted(started.optimizer.state().items()) if k.startswith("exp_avg/")]
    return torch.cat(moments) * 10, values


def test_the_gradient_is_that_of_a_plain_nll_per_token(
    tiny_model: Path, train_pairs: list[TrainPair], answers: list[TrainLabel]
) -> None:
    """Pairs of weight 0 leave the NLL alone: sft_weight x -(sum of log p) / tokens, over the tokens of the step, which
    holds two rows twice. Then pairs that count: both gradients add up."""
    settings = {"sft": ("a.jsonl",), "sft_weight": 0.3, "sft_batch_size": 6, "beta": 1.0}
    config = data.config(tiny_model, **settings)
    silent = [replace(p, weight=0.0) for p in train_pairs]
    found, values = gradient(tiny_model, config, silent, answers)

    plain = data.policy(tiny_model)
    plain.set_rows("separate")
    drawn = [answers[i] for i in sft_rows(4, 6, 0, 0)]
    assert sorted(map(drawn.count, answers)) == [1, 1, 2, 2]
    logps = [data.plain_logp(plain.policy, row.prompt_ids, row.completion.token_ids) for row in drawn]
    tokens = sum(len(row.completion.token_ids) for row in drawn)
    nll = -torch.stack(logps).sum() / tokens
    (0.3 * nll).backward()
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    expected = torch.cat([trained[name].grad.flatten() for name in sorted(trained)])  # type: ignore[union-attr]  # after backward
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert values["sft/nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert values["sft/tokens"] == tokens
    assert values["loss"] == pytest.approx(0.3 * nll.item(), rel=1e-5)

    pairs_alone, without = gradient(tiny_model, data.config(tiny_model, beta=1.0), train_pairs, ())
    both, together = gradient(tiny_model, config, train_pairs, answers)
    assert (both - pairs_alone - expected).norm() <= 1e-4 * expected.norm()
    assert together["loss"] == pytest.approx(without["loss"] + 0.3 * nll.item(), rel=1e-5)
    assert without.keys() == together.keys() - {"sft/nll", "sft/tokens"}
    assert together["tokens/unique"] > without["tokens/unique"]


@pytest.mark.parametrize(
    "changes", [{}, {"use_weighting": True}, {"loss_type": ("orpo",), "nll_scope": "prompt_response"}]
)
def test_no_budget_and_no_loss_changes_what_is_imitated(
    tiny_model: Path, train_pairs: list[TrainPair], answers: list[TrainLabel], changes: dict[str, Any]
) -> None:
    """Micro-batches of 30 tokens and of any number; the NLL covers completions alone, whatever the losses cover."""
    settings = {"sft": ("a.jsonl",), "sft_batch_size": 4, **changes}
    whole, cut = (
        gradient(
            tiny_model, data.config(tiny_model, max_tokens_per_micro_batch=budget, **settings), train_pairs, answers
        )
        for budget in (10**9, 30)
    )
    assert (whole[0] - cut[0]).norm() <= 1e-5 * whole[0].norm()
    assert whole[1] == pytest.approx(cut[1], rel=1e-5, abs=1e-6)
    plain = data.policy(tiny_model)
    plain.set_rows("separate")
    logps = [data.plain_logp(plain.policy, row.prompt_ids, row.completion.token_ids) for row in answers]
    tokens = sum(len(row.completion.token_ids) for row in answers)
    assert whole[1]["sft/nll"] == pytest.approx(-sum(logp.item() for logp in logps) / tokens, rel=1e-4)


def test_metrics_of_a_source_are_those_of_its_rows(tiny_model: Path, train_pairs: list[TrainPair]) -> None:
    """Six rows of the first source and four of the second in one step: each mean is that of a step of these rows."""
    rows = [replace(p, weight=1 + n / 4, source=int(n >= 6)) for n, p in enumerate(train_pairs)]
    config = data.config(tiny_model, "a", "b", source_weights=(6.0, 4.0), train_batch_size=10, beta=1.0)
    model = data.policy(tiny_model)
    with torch.no_grad():  # away from the reference, so that no metric is 0
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02)
    values = next(loop.steps(data.trainer(model, config), rows, 0)).values
    assert (values["pairs.0/rows"], values["pairs.1/rows"]) == (6, 4)
    assert values["loss"] == pytest.approx(0.6 * values["pairs.0/loss"] + 0.4 * values["pairs.1/loss"], rel=1e-5)
    for source, part in enumerate((rows[:6], rows[6:])):
        fresh = data.policy(tiny_model)
        with torch.no_grad():
            for parameter in (p for p in fresh.parameters() if p.requires_grad):
                parameter.add_(0.02)
        alone = config.model_copy(update={"source_weights": (), "train_batch_size": len(part)})
        expected = next(loop.steps(data.trainer(fresh, alone), part, 0)).values
        for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies"):
            assert values[f"pairs.{source}/{name}"] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_a_plan_counts_the_tokens_of_rows_to_imitate(tiny_model: Path, answers: list[TrainLabel]) -> None:
    """Two steps of one pair (10 + 5 + 1 tokens) and two answers each: every answer once."""
    pairs = [TrainPair(str(n), "c", "r", (n,) * 10, (9,) * 5, (20,), None, None, 1.0) for n in (1, 2)]
    config = data.config(tiny_model, sft=("a",), train_batch_size=1, sft_batch_size=2)
    own = sum(len(row.prompt_ids) + len(row.completion.token_ids) for row in answers)
    found = plan.unique_tokens(pairs, config, 10**6, answers)
    assert found["logical"] == 2 * 26 + own
    assert 2 * 16 < found["computed"] <= 2 * 16 + own


def command(model: Path, *flags: object) -> tuple[object, ...]:
    return (
        "train", "--model", model, "--dtype", "float32", "--lora-r", 2, "--train-batch-size", 3,
        "--learning-rate", 1e-2, "--save-steps", 1, "--save-total-limit", 99, *flags,
    )  # fmt: skip


def preference(*numbers: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"No {n} today."} for n in numbers]


def test_sources_with_weights_and_rows_to_imitate_go_on_to_the_bit(
    call: Call, tiny_model: Path, tmp_path: Path, write: Write
) -> None:
    """Two epochs of 8 rows, 6 and 2, from files of 4 and 4, with 2 of 4 answers a step. The second run goes on after
    step 4 of 6, in the middle of the second epoch. One answer of the file is faulty: it is in the ledger."""
    sources = ("--pairs", write(*preference(0, 1, 2, 3), name="a.jsonl"),
               "--pairs", write(*preference(4, 5, 6, 7), name="b.jsonl"))  # fmt: skip
    faulty = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": " "}]}
    talk = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "You."}]}
    answers = write(talk, faulty, *({**talk, "messages": [*talk["messages"][:1], m]} for m in (
        {"role": "assistant", "content": "Me."}, {"role": "assistant", "content": "They."},
        {"role": "assistant", "content": "We, they and you."})), name="sft.jsonl")  # fmt: skip
    flags = command(
        tiny_model, *sources, "--source-weights", 0.75, "--source-weights", 0.25, "--num-train-epochs", 2,
        "--sft", answers, "--sft-batch-size", 2, "--sft-weight", 0.5, "--out",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = call(*flags, whole)
    assert done.code == 0, done.stderr
    assert "pairs.0: an epoch draws 6 of 4 rows, each 1.5 times" in done.stderr
    assert "pairs.1: an epoch draws 2 of 4 rows, each 0.5 times" in done.stderr
    assert "sft: every step adds 0.5 x the NLL of a token of 2 of 4 rows" in done.stderr
    lines = metrics(whole)
    assert len(lines) == 6
    for epoch in (lines[:3], lines[3:]):
        assert [sum(line[f"pairs.{source}/rows"] for line in epoch) for source in (0, 1)] == [6, 2]
    assert all(line["sft/nll"] > 0 and line["sft/tokens"] > 2 for line in lines)
    ((dropped,), manifest) = (pq.read_table(whole / "dropped.parquet").to_pylist(), store.read_manifest(whole))
    assert dropped["id"] == f"{answers}, line 2"
    assert (manifest["totals"]["pairs"], manifest["totals"]["sft"]) == (8, 4)
    assert "0.5 x NLL of 2 rows of sft" in (whole / "adapter" / "README.md").read_text()

    shutil.copytree(whole, cut)
    (cut / "manifest.json").unlink()
    shutil.rmtree(cut / "adapter")
    for path in sorted((cut / "checkpoints").iterdir())[4:]:
        shutil.rmtree(path)
    done = call(*flags, cut)
    assert done.code == 0, done.stderr
    assert "resuming after step 4" in done.stderr
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert adapter(cut) == adapter(whole)

    done = call(*flags, whole, "--sft-weight", 0.6)
    assert (done.code, "sft_weight" in done.stderr) == (2, True), done.stderr


def test_the_run_of_a_file_put_together_by_hand_is_the_same_to_the_bit(
    call: Call, tiny_model: Path, tmp_path: Path, write: Write
) -> None:
    """2 rows and 4 at equal shares, until both are used up: a file with each row of the first twice."""
    few, many = preference(0, 1), preference(2, 3, 4, 5)
    sources = ("--pairs", write(*few, name="a.jsonl"), "--pairs", write(*many, name="b.jsonl"))
    weights = ("--source-weights", 1, "--source-weights", 1, "--epoch-length", "all_exhausted")
    by_hand = write(few[0], few[0], few[1], few[1], *many, name="both.jsonl")
    for out, flags in (("mixed", (*sources, *weights)), ("by_hand", ("--pairs", by_hand))):
        done = call(*command(tiny_model, *flags, "--out", tmp_path / out))
        assert done.code == 0, done.stderr
    assert adapter(tmp_path / "mixed") == adapter(tmp_path / "by_hand")
    mixed, hand = (metrics(tmp_path / out) for out in ("mixed", "by_hand"))
    assert [{k: v for k, v in line.items() if not k.startswith("pairs.")} for line in mixed] == hand
    assert {name for line in mixed for name in line} >= {"pairs.0/rows", "pairs.1/loss", "pairs.1/rewards/margins"}


def test_what_is_no_answer_to_imitate_is_refused(
    call: Call, tiny_model: Path, pairs: Path, tmp_path: Path, write: Write
) -> None:
    run = command(tiny_model, "--pairs", pairs, "--out", tmp_path / "t", "--sft")
    labels = write({"prompt": "p", "completion": "c", "label": True})
    empty = write({"prompt": "p", "completion": " "}, name="empty.jsonl")
    asked = write({"question": "p", "text": "c"}, name="asked.jsonl")
    for source, flags, code, said in (
        (pairs, (), 2, "is a run"),
        (labels, (), 65, "a row of format 'label', not 'completion'"),
        (empty, (), 65, "can be imitated: 1 empty"),
        (tmp_path / "gone.jsonl", (), 66, "does not exist"),
        (asked, (), 65, "no known format"),
        (asked, ("--sft-column", "completion=answer"), 65, "no column 'answer'"),
    ):
        done = call(*run, source, *flags)
        assert (done.code, said in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "t").exists()
    done = call(*run, asked, "--sft-column", "completion=text")
    assert done.code == 0, done.stderr


def test_labels_and_groups_are_mixed_alike(
    call: Call, tiny_model: Path, tmp_path: Path, rows: list[Pair], write: Write
) -> None:
    """Two runs of each kind beside answers to imitate, with an evaluation: both have metrics of each source."""
    answers = write(*SFT)
    sources: dict[str, list[object]] = {"labels": [], "groups": []}
    for number, part in enumerate((rows[:6], rows[6:])):
        run = data.write_run(tmp_path / f"r{number}", labels=data.labels_of(part), groups=data.groups_of(part))
        for kind, flags in sources.items():
            flags += [f"--{kind}", run, "--source-weights", 1]
    for kind, loss in (("labels", "kto"), ("groups", "plackett_luce")):
        out = tmp_path / kind
        flags = ("--loss-type", loss, "--eval-split", 0.3, "--sft", answers, "--sft-batch-size", 2, "--out", out)
        done = call(*command(tiny_model, *sources[kind], *flags))
        assert done.code == 0, done.stderr
        lines = metrics(out)
        assert {f"{kind}.0/loss", f"{kind}.1/rows", f"{kind}.0/rewards/chosen"} <= {
            k for line in lines for k in line
        } or (kind == "groups")
        drawn = [sum(line[f"{kind}.{source}/rows"] for line in lines) for source in (0, 1)]
        assert abs(drawn[0] - drawn[1]) <= 1
        assert any(name.startswith(f"eval_{kind}.") for name in lines[-1])
        assert all(line["sft/nll"] > 0 for line in lines)
        assert not any(name.startswith("eval_sft") for name in lines[-1])


def test_a_source_that_lost_every_row_is_named(call: Call, tiny_model: Path, tmp_path: Path, write: Write) -> None:
    good = write(*preference(1, 2), name="a.jsonl")
    bad = write({"prompt": "p", "chosen": "same", "rejected": "same"}, name="b.jsonl")
    flags = ("--pairs", good, "--pairs", bad, "--source-weights", 1, "--source-weights", 1)
    done = call(*command(tiny_model, *flags, "--out", tmp_path / "t"))
    assert done.code == 2, done.stderr
    assert "pairs.1 gets no row" in done.stderr
    assert "it has 0 rows to train on" in done.stderr
