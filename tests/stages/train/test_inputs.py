"""What a run reads: the right kind of rows for its losses, checked ids, one reference, and columns that losses need."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import DataError, IdentityError, PrefpipeError, UsageError
from prefpipe.forward import load
from prefpipe.ids import ids_digest
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.models import policy
from prefpipe.runs import store
from prefpipe.schemas import RefLogps, to_table
from prefpipe.stages.train.examples import TrainLabel, TrainPair
from prefpipe.stages.train.inputs import prepare
from prefpipe.stages.train.reference.identity import Reference
from tests.stages.train import data

BARE = data.bare_pairs(8)
LABELS = data.labels_of(BARE)
OTHER = "weights:" + "0" * 32


def refused(code: int, tiny_model: Path, *pairs: Path, **changes: object) -> PrefpipeError:
    with pytest.raises(PrefpipeError) as caught:
        prepare(data.config(tiny_model, *pairs, **changes))
    assert caught.value.exit_code == code
    return caught.value


def kto(labels: Path, **changes: object) -> dict[str, object]:
    return {"loss_type": ("kto",), "labels": (str(labels),), **changes}


def test_each_kind_of_loss_wants_its_rows(tiny_model: Path, tmp_path: Path):
    run = data.write_run(tmp_path / "r", pairs=BARE, labels=LABELS, groups=data.groups_of(BARE))
    assert isinstance(prepare(data.config(tiny_model, run)).rows[0], TrainPair)
    assert len(prepare(data.config(tiny_model, **kto(run))).rows) == len(LABELS)
    listwise = {"loss_type": ("plackett_luce",), "groups": (str(run),)}
    assert [len(r.answers) for r in prepare(data.config(tiny_model, **listwise)).rows] == [4, 4, 4, 2, 2]
    assert "no labels given: loss kto" in refused(2, tiny_model, loss_type=("kto",)).message
    assert "--pairs is given" in refused(2, tiny_model, run, **kto(run)).message
    assert "--labels DIR" in (refused(2, tiny_model, run, loss_type=("kto",)).hint or "")
    assert "group_by_prompt" in refused(2, tiny_model, **kto(run, group_by_prompt=True)).message


@pytest.mark.parametrize("kind", ["pairs", "labels", "kl_bank", "groups"])
def test_edited_token_ids_are_refused_in_every_dataset(tiny_model: Path, tmp_path: Path, kind: str):
    bank = kl_bank(LABELS, 4, 0)
    groups = data.groups_of(BARE)
    ids = [[5, 5], *groups[0].token_ids[1:]]
    rows = {
        "pairs": [replace(BARE[0], rejected_token_ids=[5, 5])],
        "labels": [replace(LABELS[0], token_ids=[5, 5]), *LABELS[1:]] if kind == "labels" else LABELS,
        "kl_bank": [replace(bank[0], token_ids=[5, 5])] if kind == "kl_bank" else bank,
        "groups": [replace(groups[0], token_ids=ids)],
    }
    run = data.write_run(tmp_path / "r", **rows)
    changes = kto(run) if kind in ("labels", "kl_bank") else {"loss_type": ("plackett_luce",), "groups": (str(run),)}
    error = refused(76, tiny_model, *([run] if kind == "pairs" else []), **({} if kind == "pairs" else changes))
    assert isinstance(error, IdentityError)
    assert "do not match their digest" in error.message


def test_the_bank_comes_from_the_run_or_is_made_of_its_labels(tiny_model: Path, tmp_path: Path):
    stored = kl_bank(LABELS, 5, seed=9)
    with_bank = data.write_run(tmp_path / "with", labels=LABELS, kl_bank=stored)
    without = data.write_run(tmp_path / "without", labels=LABELS)
    assert [row.row_id for row in prepare(data.config(tiny_model, **kto(with_bank))).bank] == [
        b.bank_id for b in stored
    ]
    made = prepare(data.config(tiny_model, **kto(without, kl_bank_size=7))).bank
    assert [row.row_id for row in made] == [b.bank_id for b in kl_bank(LABELS, 7, 0)]
    unpaired = prepare(data.config(tiny_model, loss_type=("apo_zero_unpaired",), labels=(str(without),)))
    assert unpaired.bank == []


def test_an_unpaired_file_alone_is_enough(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"{n}.", "label": n % 3 > 0} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = prepare(data.config(tiny_model, **kto(path)))
    assert job.reference == Reference(policy.resolve(str(tiny_model)).id)
    labels = [row for row in job.rows if isinstance(row, TrainLabel)]
    assert [row.desirable for row in labels] == [n % 3 > 0 for n in range(6)]
    own = {(row.prompt, row.answer.ids) for row in labels}
    assert 6 <= len(job.bank) <= 30  # of every prompt with the completions of the five others
    assert not {(row.prompt, row.answer.ids) for row in job.bank} & own


def test_an_unscored_bank_of_another_reference_names_score(tiny_model: Path, tmp_path: Path):
    """Labels carry values of a model that is not here; the bank has none, and nobody here can make them."""
    scored = [replace(row, reference=OTHER, ref_token_logps=[-1.0] * len(row.token_ids)) for row in LABELS]
    run = data.write_run(tmp_path / "r", labels=scored, kl_bank=kl_bank(LABELS, 4, 0))
    error = refused(65, tiny_model, **kto(run))
    assert isinstance(error, DataError)
    assert "4 of 20 rows have no log-probs of their reference" in error.message
    assert "prefpipe score" in (error.hint or "")


def test_values_of_an_unknown_reference_are_refused(tiny_model: Path, tmp_path: Path):
    scored = [replace(row, reference=OTHER, ref_token_logps=[-1.0] * len(row.token_ids)) for row in LABELS]
    run = data.write_run(tmp_path / "r", labels=scored)
    found = {"loss_type": ("apo_zero_unpaired",), "labels": (str(run),)}
    assert "different: weights" in refused(76, tiny_model, **found).message


@pytest.mark.parametrize(("loss", "column"), [("soft", "preference_prob"), ("sppo", "preference_prob"),
                                              ("margin", "reward_gap"), ("odpo", "reward_gap")])  # fmt: skip
def test_a_loss_that_reads_a_null_column_says_which(tiny_model: Path, tmp_path: Path, loss: str, column: str):
    full = [replace(row, preference_prob=0.8, reward_gap=1.0) for row in BARE]
    lacking = [*full[:3], replace(full[3], **{column: None}), *full[4:]]
    good, bad = (data.write_run(tmp_path / name, pairs=rows) for name, rows in (("good", full), ("bad", lacking)))
    assert len(prepare(data.config(tiny_model, good, loss_type=(loss,))).rows) == 8
    message = refused(65, tiny_model, bad, loss_type=(loss,)).message
    assert f"loss {loss} reads {column}, which 1 of 8 pairs lack" in message
    assert BARE[3].pair_id in message


def test_a_gap_without_a_logarithm_is_refused(tiny_model: Path, tmp_path: Path):
    run = data.write_run(tmp_path / "r", pairs=[replace(row, reward_gap=0.0) for row in BARE])
    assert "not above 0 in 8 pairs" in refused(65, tiny_model, run, loss_type=("odpo",)).message
    assert prepare(data.config(tiny_model, run, loss_type=("margin",))).rows


def test_reference_free_losses_ask_for_no_reference(tiny_model: Path, tmp_path: Path):
    """Values of an unknown model are no matter to them."""
    foreign = [data.with_values(r, [-1.0] * len(r.chosen_token_ids), [-1.0] * len(r.rejected_token_ids), OTHER, "x")
               for r in BARE]  # fmt: skip
    run = data.write_run(tmp_path / "r", pairs=foreign)
    for loss in ("simpo", "orpo", "cpo", "alphapo", "nll"):
        assert prepare(data.config(tiny_model, run, loss_type=(loss,))).reference is None


def test_a_missing_dataset_of_a_run_is_named(tiny_model: Path, tmp_path: Path):
    run = data.write_run(tmp_path / "r", pairs=BARE)
    with pytest.raises((DataError, UsageError, PrefpipeError), match="labels"):
        prepare(data.config(tiny_model, **kto(run)))


def scored(out: Path, tiny_model: Path) -> Path:
    """A run that holds ref_logps of the completions of BARE, as `score` and `generate` write them."""
    own = data.with_reference(BARE, tiny_model)
    found = [
        RefLogps(row.completion_id, row.reference or "", row.scorer or "", row.ids_digest,
                 row.ref_token_logps or [], sum(row.ref_token_logps or []), len(row.token_ids))
        for row in data.labels_of(own)
    ]  # fmt: skip
    with store.open_run(out, "score", BuildPairsConfig(), {"test": str(out)}, force=False) as run:
        run.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, found))
        run.finish({"rows": len(found)}, {})
    return out


def test_values_of_a_scored_run_win_over_the_columns(tiny_model: Path, tmp_path: Path):
    """Columns of a model that is not here would be refused; the run has values of the one that is, for every kind."""
    foreign = [data.with_values(r, [-9.0] * len(r.chosen_token_ids), [-9.0] * len(r.rejected_token_ids), OTHER, "x")
               for r in BARE]  # fmt: skip
    run = data.write_run(tmp_path / "r", pairs=foreign, labels=data.labels_of(foreign), groups=data.groups_of(BARE))
    values = (str(scored(tmp_path / "s", tiny_model)),)
    own = data.labels_of(data.with_reference(BARE, tiny_model))
    expected = {r.completion_id: tuple(r.ref_token_logps or ()) for r in own}
    kinds: list[dict[str, object]] = [
        {"pairs": (str(run),)}, {"loss_type": ("apo_zero_unpaired",), "labels": (str(run),)},
        {"loss_type": ("plackett_luce",), "groups": (str(run),)},
    ]  # fmt: skip
    for changes in kinds:
        job = prepare(data.config(tiny_model, ref_logps=values, **changes))
        assert job.reference == Reference(policy.resolve(str(tiny_model)).id)
        assert job.scorers == {load.scorer_name("float32")}
        assert "ref_logps.0" in job.inputs
        for row in job.rows:
            for answer in row.answers:
                assert answer.reference == pytest.approx(expected[answer.completion_id], abs=1e-6)
    refused(76, tiny_model, run)


def test_a_scored_run_of_other_rows_or_for_other_ids_is_refused(tiny_model: Path, tmp_path: Path):
    values = (str(scored(tmp_path / "s", tiny_model)),)
    others = data.write_run(tmp_path / "o", pairs=data.bare_pairs(4, seed=3))
    assert "none of 8 completions has log-probs" in refused(65, tiny_model, others, ref_logps=values).message
    ids = [*BARE[0].chosen_token_ids, 5]
    edited = replace(BARE[0], chosen_token_ids=ids, chosen_ids_digest=ids_digest(BARE[0].prompt_token_ids, ids))
    run = data.write_run(tmp_path / "e", pairs=[edited, *BARE[1:]])
    assert "other token ids" in refused(76, tiny_model, run, ref_logps=values).message
    good = data.write_run(tmp_path / "g", pairs=BARE)
    assert "read by none of simpo" in refused(2, tiny_model, good, loss_type=("simpo",), ref_logps=values).message
