"""Missing reference values are made once, kept in the run, and are those of the model."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from prefpipe.config.train import TrainConfig
from prefpipe.errors import IdentityError
from prefpipe.forward import load
from prefpipe.runs import store
from prefpipe.schemas import RefLogps, from_table
from prefpipe.stages.train import examples as train_rows
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.reference import values
from prefpipe.stages.train.reference.values import Kept
from prefpipe.stages.train.session import Session
from tests.stages.train import data

ALONE = World(0, 1)


def test_values_of_every_kind_of_row_are_made_once_and_read_back(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Rows that have values are not scored; the second call reads what the first one wrote, to the bit."""
    bare = data.bare_pairs(4)
    known = data.with_reference(bare, tiny_model)
    expected = {a.completion_id: a.ref_logps for p in train_rows.from_pairs(known) for a in p.completions}
    model = data.policy(tiny_model)
    mixed = [*train_rows.from_pairs([known[0], *bare[1:3]]), *train_rows.from_labels(data.labels_of(bare[3:]))]
    with store.open_run(tmp_path / "t", "train", TrainConfig(), {"x": "y"}, force=False) as run:
        first = values.missing_ref_logps(
            Session(ALONE, run), mixed, model, load.scorer_name("float32"), "weights:x", Kept()
        )
        assert "4 of 5 rows have no reference log-probs" in capsys.readouterr().err
        again = values.missing_ref_logps(
            Session(ALONE, run), mixed, model, load.scorer_name("float32"), "weights:x", Kept()
        )
        assert "scored once" not in capsys.readouterr().err
        rows = from_table(RefLogps, run.read_part("ref_logps", RefLogps, 0))
    assert first == again
    keys = {a.completion_id for row in mixed[1:] for a in row.completions}
    assert set(first) == keys
    for key in keys:
        assert first[key] == pytest.approx(expected[key], abs=2e-5)
    assert {(r.reference, r.scorer) for r in rows} == {("weights:x", load.scorer_name("float32"))}
    filled = values.fill_missing(mixed, first)
    assert filled[0] == mixed[0]
    assert all(train_rows.has_ref_logps(row) for row in filled)


@dataclass
class Ranks:
    """One of two ranks: what the other one gives is there already."""

    rank: int
    shares: list[list[list[list[float]]]]
    size: int = 2

    def gather(self, own: list[list[list[float]]]) -> list[list[list[list[float]]]]:
        self.shares[self.rank] = own
        return self.shares


def test_ranks_audit_a_share_each_and_find_the_same(tiny_model: Path):
    """Five rows on two ranks: three and two, put together in their order; the last to come has all of them."""
    known = train_rows.from_pairs(data.with_reference(data.bare_pairs(5), tiny_model))
    model, config, scorers = data.policy(tiny_model), data.config(tiny_model), {load.scorer_name("float32")}

    def audited(world: Any) -> dict[str, Any]:
        found = values.audit_rows(world, model, known, scorers, config, Kept())
        return cast(dict[str, Any], found.report)

    shares: list[list[list[list[float]]]] = [[[[0.0]]] * 3, [[[0.0]]] * 2]
    with contextlib.suppress(ValueError, IdentityError):  # the other rank's values are not there yet
        audited(Ranks(0, shares))
    second, first = audited(Ranks(1, shares)), audited(Ranks(0, shares))
    assert [len(share) for share in shares] == [3, 2]
    assert first == second
    assert first == pytest.approx(audited(ALONE), abs=1e-5)


def test_nothing_missing_writes_nothing(tiny_model: Path, tmp_path: Path):
    known = train_rows.from_pairs(data.with_reference(data.bare_pairs(2), tiny_model))
    with store.open_run(tmp_path / "t", "train", TrainConfig(), {"x": "y"}, force=False) as run:
        assert (
            values.missing_ref_logps(
                Session(ALONE, run), known, data.policy(tiny_model), load.scorer_name("float32"), "weights:x", Kept()
            )
            == {}
        )
        assert not run.has_shard(["ref_logps"], 0)
