"""Every loss through the whole path: from its dataset to an adapter, by the command line where a user would."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefpipe.config.losses import LOSSES, names
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, PrefpipeError, StorageError
from prefpipe.forward.logps import TreeModel
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.runs import fsio, store
from prefpipe.schemas import RefLogps
from prefpipe.stages.train import examples as train_rows
from prefpipe.stages.train import loop, stage
from prefpipe.stages.train.examples import TrainLabel, TrainPair
from prefpipe.stages.train.losses import registry
from prefpipe.stages.train.micro_batches import balanced_batches, bank_rows
from prefpipe.stages.train.optimizer import learning_rate
from tests.conftest import Cli
from tests.forge import Forge
from tests.stages.train import data
from tests.stages.train.cases import pairs as batch_of
from tests.stages.train.data import lora, plain_logp
from tests.stages.train.runs import adapter, metrics, two_ranks

FAST = (
    "--dtype", "float32", "--learning-rate", 3e-3, "--train-batch-size", 4, "--num-train-epochs", 2, "--lora-r", 4,
    "--lora-alpha", 8,
)  # fmt: skip


def run(config: TrainConfig, out: Path) -> dict[str, Any]:
    return stage.run(config, out, force=False)


@pytest.fixture(scope="module")
def pairs(tiny_model: Path) -> list[TrainPair]:
    """Eight pairs with the reference values of the tiny model, graded."""
    rows = data.with_reference(data.bare_pairs(8), tiny_model)
    return train_rows.from_pairs([replace(row, preference_prob=0.8, reward_gap=1.5) for row in rows])


@pytest.mark.parametrize("name", names("pairs"))
def test_a_loss_of_pairs_starts_at_its_value_and_falls(tiny_model: Path, pairs: list[TrainPair], name: str):
    """At step 0 the policy is the reference; every loss is lower after a few passes over the same eight pairs."""
    config = data.config(
        tiny_model, loss_type=(name,), label_smoothing={"exo_pair": 1e-3, "robust": 0.2}.get(name, 0.0),
        num_train_epochs=8, train_batch_size=8, lr_scheduler_type="constant",
    )  # fmt: skip
    found = [m.values["loss"] for m in loop.steps(data.trainer(data.policy(tiny_model), config), pairs, 0)]
    sums = [(sum(p.ref_chosen or ()), sum(p.ref_rejected or ())) for p in pairs]
    rows = [(*both, *both, len(p.chosen), len(p.rejected)) for both, p in zip(sums, pairs, strict=True)]
    there = registry.loss(name, batch_of(*rows, prob=0.8, gap=1.5), config.objective.settings)
    assert found[0] == pytest.approx(float(there.mean()), rel=1e-3)
    assert found[-1] < found[0]


@pytest.mark.parametrize("name", ["orpo", "nll"])
def test_the_scope_of_the_nll_is_honoured(tiny_model: Path, pairs: list[TrainPair], name: str):
    """With the prompt the first loss is that of all tokens but the very first; a token budget does not change it."""
    found: list[float] = []
    for scope, budget in (("response", 10**6), ("prompt_response", 10**6), ("prompt_response", 30)):
        config = data.config(
            tiny_model, loss_type=(name,), nll_scope=scope, train_batch_size=8, max_tokens_per_micro_batch=budget
        )
        first = next(loop.steps(data.trainer(data.policy(tiny_model), config), pairs, 0)).values
        found.append(first["loss"])
        assert first["logps/chosen"] == pytest.approx(sum(sum(p.ref_chosen or ()) for p in pairs) / 8, rel=1e-4)
    model = data.policy(tiny_model)
    with torch.no_grad():
        causal = model.policy
        model.set_rows("separate")
        whole = [-plain_logp(causal, p.prompt_ids[:1], (*p.prompt_ids[1:], *p.chosen)).item() for p in pairs]
        mean = sum(v / (len(p.prompt_ids) - 1 + len(p.chosen)) for v, p in zip(whole, pairs, strict=True)) / 8
        own = sum(-sum(p.ref_chosen or ()) / len(p.chosen) for p in pairs) / 8
    assert found[1] - found[0] == pytest.approx(mean - own, abs=1e-4)
    assert found[2] == pytest.approx(found[1], rel=1e-5)


def test_ld_alpha_0_trains_on_the_shared_length_alone(tiny_model: Path, pairs: list[TrainPair]):
    """What a longer side says after the end of the shorter one is no matter: cut it off and nothing changes."""
    config = data.config(tiny_model, ld_alpha=0.0, train_batch_size=8, num_train_epochs=3)
    cut: list[TrainPair] = []
    for p in pairs:
        n = min(len(p.chosen), len(p.rejected))
        cut.append(
            replace(
                p, chosen=p.chosen[:n], rejected=p.rejected[:n], ref_chosen=(p.ref_chosen or ())[:n],
                ref_rejected=(p.ref_rejected or ())[:n],
            )
        )  # fmt: skip
    plain = data.config(tiny_model, train_batch_size=8, num_train_epochs=3)
    ours, theirs = (
        [m.values["loss"] for m in loop.steps(data.trainer(data.policy(tiny_model), c), rows, 0)]
        for c, rows in ((config, pairs), (plain, cut))
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]


@pytest.fixture(scope="module")
def labels(tiny_model: Path) -> list[TrainLabel]:
    return train_rows.from_labels(data.labels_of(data.with_reference(data.bare_pairs(7), tiny_model)))


@pytest.fixture(scope="module")
def bank(tiny_model: Path) -> list[TrainLabel]:
    """Mismatched rows with reference values that are 2 nats too low, so that z0 is 2 and not 0 at the start."""
    rows = train_rows.from_bank(kl_bank(data.labels_of(data.bare_pairs(7)), 20, 0))
    model = data.policy(tiny_model)
    model.set_rows("separate")
    with torch.no_grad():
        values = {r.row_id: plain_logp(model.policy, r.prompt_ids, r.completion.token_ids).item() for r in rows}
    return [
        r.with_ref_logps({r.row_id: (values[r.row_id] - 2, *[0.0] * (len(r.completion.token_ids) - 1))}) for r in rows
    ]


def plain_kto(model: TreeModel, rows: list[TrainLabel], bank: list[TrainLabel], config: TrainConfig) -> list[float]:
    """KTO written out: z0 from the drawn bank rows without gradient, then lambda - v, the mean over the step."""
    model.set_rows("separate")
    trainable = [p for p in model.policy.parameters() if p.requires_grad]
    adamw, losses = torch.optim.AdamW(trainable, weight_decay=0.0), list[float]()
    total = loop.num_steps(len(rows), config)
    for step in range(total):
        epoch, within = divmod(step, total // config.num_train_epochs)
        labels = [bool(r.desirable) for r in rows]
        batch = [rows[i] for i in balanced_batches(labels, config.train_batch_size, config.seed, epoch)[within]]

        def ratio(row: TrainLabel) -> torch.Tensor:
            return plain_logp(model.policy, row.prompt_ids, row.completion.token_ids) - sum(
                row.completion.ref_logps or ()
            )

        with torch.no_grad():
            drawn = [ratio(bank[i]) for i in bank_rows(len(bank), config.kl_rows, config.seed, step)]
        z0 = max(0.0, float(torch.stack(drawn).mean()))
        loss = torch.zeros(())
        for row in batch:
            x = config.beta * (ratio(row) - z0)
            value = torch.sigmoid(x) if row.desirable else torch.sigmoid(-x)
            weight = config.desirable_weight if row.desirable else config.undesirable_weight
            loss = loss + weight * (1 - value) / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        adamw.param_groups[0]["lr"] = learning_rate(
            step, total, peak=config.learning_rate, warmup_ratio=config.warmup_ratio, schedule=config.lr_scheduler_type
        )
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def kto(model: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"loss_type": ("kto",), "beta": 0.3, "desirable_weight": 1.2, "kl_rows": 5}
    return data.config(model, **{**values, **changes})


def test_kto_equals_kto_written_out(tiny_model: Path, labels: list[TrainLabel], bank: list[TrainLabel]):
    """Two epochs of seven desirable and seven undesirable rows: losses to 1e-4 relative, weights to 1e-3."""
    config = kto(tiny_model)
    ours, theirs = data.policy(tiny_model), data.policy(tiny_model)
    found = list(loop.steps(data.trainer(ours, config), labels, 0, bank))
    expected = plain_kto(theirs, labels, bank, config)
    assert found[0].values["kto/z0"] == pytest.approx(2.0, abs=1e-3)
    assert len({round(m.values["kto/z0"], 4) for m in found}) > 4  # other rows and another policy in every step
    assert [m.values["loss"] for m in found] == pytest.approx(expected, rel=1e-4)
    mine, other = (torch.cat([v.flatten() for v in lora(m).values()]) for m in (ours, theirs))
    start = torch.cat([v.flatten() for v in lora(data.policy(tiny_model)).values()])
    assert (mine - other).norm() <= 1e-3 * (other - start).norm()


def test_kto_does_not_depend_on_the_token_budget(tiny_model: Path, labels: list[TrainLabel], bank: list[TrainLabel]):
    """z0 and the class means are of the global batch, however it is cut."""
    configs = [kto(tiny_model, train_batch_size=9, max_tokens_per_micro_batch=n) for n in (10**6, 60, 16)]
    found = [next(loop.steps(data.trainer(data.policy(tiny_model), c), labels, 0, bank)).values for c in configs]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-5)
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kto/z0"} <= set(found[0])
    assert not any("kl" in name.lower() for name in found[0])


def test_a_step_of_one_class_reports_it_alone(tiny_model: Path, labels: list[TrainLabel], bank: list[TrainLabel]):
    good = [row for row in labels if row.desirable]
    values = next(loop.steps(data.trainer(data.policy(tiny_model), kto(tiny_model)), good, 0, bank)).values
    assert "rewards/chosen" in values
    assert "rewards/rejected" not in values
    assert all(map(math.isfinite, values.values()))


def unpaired_file(path: Path) -> Path:
    lines = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": True} for n in range(5)]
    lines += [{"prompt": f"What is {n}?", "completion": "Who knows?", "label": False} for n in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_kto_from_an_unpaired_file_by_the_command_line(cli: Cli, tiny_model: Path, tmp_path: Path):
    """Step 0: policy = reference, so z0 = 0 and the loss is lambda / 2. Values of labels and bank are made once."""
    source = unpaired_file(tmp_path / "labels.jsonl")
    done = cli(
        "train", "--loss-type", "kto", "--labels", source, "--model", tiny_model, *FAST, "--out", tmp_path / "t",
        "--desirable-weight", 1.25, "--kl-bank-size", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "18 of 18 rows have no reference log-probs" in done.stderr
    assert "outside of [1, 1.5]" not in done.stderr
    assert "trained on 10 labels in 6 steps" in done.stdout
    lines = metrics(tmp_path / "t")
    assert lines[0]["kto/z0"] == pytest.approx(0.0, abs=1e-5)
    assert lines[0]["loss"] == pytest.approx((1.25 * 2 + 1.0 * 2) / 4 / 2, abs=1e-5)
    gap = [line["rewards/chosen"] - line["rewards/rejected"] for line in lines if "rewards/rejected" in line]
    assert gap[-1] > gap[0]
    assert store.read_dataset(tmp_path / "t", "ref_logps", RefLogps).num_rows == 18
    assert store.read_manifest(tmp_path / "t")["totals"]["labels"] == 10


def test_kto_warns_with_weights_when_classes_are_far_from_balanced(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = data.labels_of(data.bare_pairs(6))
    rows = [row for row in rows if not row.label or row is rows[0]]
    source = data.write_run(tmp_path / "l", labels=rows)
    run(data.config(tiny_model, loss_type=("kto",), labels=(str(source),), num_train_epochs=1), tmp_path / "t")
    assert "outside of [1, 1.5]: --desirable-weight" in capsys.readouterr().err


def test_kto_interrupted_and_resumed_equals_uninterrupted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bank rows, classes and z0 of every step are those of the uninterrupted run, to the bit."""
    source = data.write_run(tmp_path / "l", labels=data.labels_of(data.bare_pairs(7)))
    config = kto(tiny_model, labels=(str(source),), kl_bank_size=12)
    run(config, tmp_path / "whole")
    monkeypatch.setenv("PREFPIPE_FAULT", f"append:{fsio._passes['append'] + 4}:eio")
    with pytest.raises(StorageError):
        run(config, tmp_path / "t")
    monkeypatch.delenv("PREFPIPE_FAULT")
    run(config, tmp_path / "t")
    assert metrics(tmp_path / "t") == metrics(tmp_path / "whole")
    assert adapter(tmp_path / "t") == adapter(tmp_path / "whole")
    assert len({line["kto/z0"] for line in metrics(tmp_path / "t")}) > 3


def test_two_ranks_train_kto_as_one_does(forged: Forge, tiny_model: Path, tmp_path: Path):
    """z0 is a mean over the ranks; three bank rows on two ranks: one of them repeats a row that does not count."""
    source = data.write_run(tmp_path / "l", labels=data.labels_of(data.bare_pairs(6)))
    config = kto(
        tiny_model, labels=(str(source),), kl_bank_size=9, kl_rows=3, max_tokens_per_micro_batch=16,
        num_train_epochs=1, distributed="fsdp2",
    )  # fmt: skip
    run(config, tmp_path / "one")
    (tmp_path / "two.json").write_text(config.model_dump_json())
    done = two_ranks(forged, "train", tmp_path / "two.json", "--out", tmp_path / "two")
    assert done.code == 0, done.stderr[-4000:]
    for mine, other in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": ("simpo",), "beta": 2.0},
        {"loss_type": ("orpo",)},
        {"loss_type": ("cpo", "nll"), "loss_weights": (1.0, 1.0)},
    ],
    ids=["simpo", "orpo", "cpo+nll"],
)
def test_reference_free_losses_run_without_reference_columns_and_make_none(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
):
    source = data.write_pairs(tmp_path / "p", data.bare_pairs(8))
    manifest = run(data.config(tiny_model, source, num_train_epochs=6, train_batch_size=8, **changes), tmp_path / "t")
    assert not (tmp_path / "t" / "ref_logps").exists()
    assert manifest["identity"]["reference"] is None
    assert manifest["totals"]["audit"] is None
    lines = metrics(tmp_path / "t")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not any(name.startswith("rewards/") for name in lines[0])


def test_orpo_from_a_base_model_without_a_chat_template(cli: Cli, tiny_model: Path, tmp_path: Path):
    """The template comes from a file; without it the error names the flag."""
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model.iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
                        "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    lines = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "Who knows?"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = data.config(base, tmp_path / "pairs.jsonl", loss_type=("orpo",))
    with pytest.raises(PrefpipeError) as refused:
        run(given, tmp_path / "no")
    assert "chat-template" in refused.value.message + refused.value.hint
    done = cli(
        "train", "--loss-type", "orpo", "--pairs", tmp_path / "pairs.jsonl", "--model", base, *FAST, "--chat-template",
        template, "--out", tmp_path / "t",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path / "t")
    assert found[-1]["loss"] < found[0]["loss"]


def test_plackett_luce_from_ranked_groups(tiny_model: Path, tmp_path: Path):
    """Step 0: all orders are equally likely, ln K! of every group; K completions of a prompt are one tree."""
    source = data.write_run(tmp_path / "g", groups=data.groups_of(data.bare_pairs(8, num_prompts=3)))
    config = data.config(
        tiny_model, loss_type=("plackett_luce",), groups=(str(source),), train_batch_size=3, num_train_epochs=6
    )
    manifest = run(config, tmp_path / "t")
    lines = metrics(tmp_path / "t")
    assert lines[0]["loss"] == pytest.approx((2 * math.lgamma(7) + math.lgamma(5)) / 3, rel=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/margins"] > 0
    assert lines[0]["tokens/unique"] < lines[0]["tokens/logical"]
    assert manifest["totals"]["groups"] == 3
    assert manifest["totals"]["audit"]["rows"] == 3


def test_a_cached_value_that_is_not_finite_is_refused_with_its_row(tiny_model: Path, tmp_path: Path):
    """NaN cannot be stored at all (runs/test_store.py); minus infinity can, and one audited row would not see it."""
    rows = data.with_reference(data.bare_pairs(4), tiny_model)
    values = [-math.inf, *(rows[2].ref_chosen_token_logps or [])[1:]]
    rows[2] = data.with_values(rows[2], values, rows[2].ref_rejected_token_logps or [], rows[2].reference, "x/float32")
    source = data.write_pairs(tmp_path / "p", rows)
    with pytest.raises(DataError, match=f"row {rows[2].pair_id}: .* is not a finite number") as caught:
        run(data.config(tiny_model, source, audit_rows=1), tmp_path / "t")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--simpo-gamma", 1), "simpo_gamma = 1.0 is read by none of sigmoid (simpo, alphapo)"),
        (("--loss-type", "simpo", "--simpo-gamma", 1), "10 nats per token is out of reach"),
        (("--loss-type", "simpo", "--beta", 2, "--simpo-gamma", 1, "--simpo-gamma-beta-ratio", 0.3), "two names"),
        (("--loss-type", "exo_pair"), "label_smoothing above 0"),
        (("--loss-type", "robust", "--label-smoothing", 0.5), "less than 0.5"),
        (("--beta", 0), "greater than 0"),
        (("--beta", "inf"), "finite"),
        (("--loss-type", "kto", "--loss-type", "sigmoid", "--loss-weights", 1, "--loss-weights", 1), "different kinds"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(cli: Cli, tmp_path: Path, flags: tuple[object, ...], words: str):
    done = cli("train", *flags, "--out", tmp_path / "t")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


def test_every_loss_of_the_registry_is_run_here():
    others = {name for name, loss in LOSSES.items() if loss.kind != "pairs"}
    assert others == {"kto", "apo_zero_unpaired", "plackett_luce"}
