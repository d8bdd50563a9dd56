"""Means and quantiles of a step do not depend on how it was cut; what counts no row is left out."""

import math
import random
from typing import TypeVar

import numpy as np
import pytest
import torch

from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.tally import Tally, quantile, summarise
from tests.stages.train import data

T = TypeVar("T")

ALONE = World(0, 1)


def tallied(values: list[float], cuts: list[int]) -> dict[str, float]:
    tally = Tally()
    for start, end in zip([0, *cuts], [*cuts, len(values)], strict=True):
        own = torch.tensor(values[start:end])
        tally.add_rows({"rewards/chosen": (own, torch.ones_like(own))}, ())
    return summarise(tally, ALONE).values


def test_every_cut_gives_the_same_bits():
    values = [random.Random(0).gauss(0, 1) * 10.0**i for i in range(-8, 8)]
    whole = tallied(values, [])
    for cuts in ([1], [5, 9], list(range(1, 16))):
        assert tallied(values, cuts) == whole


def test_quantiles_are_those_of_numpy():
    source = random.Random(1)
    for count in (1, 2, 7, 100):
        values = [source.gauss(0, 3) for _ in range(count)]
        for share in (0.0, 0.05, 0.5, 0.95, 1.0):
            assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), abs=1e-12)
    assert math.isnan(quantile([1.0, math.nan], 0.5))


def test_totals_add_up_and_rows_are_averaged_over_those_that_count():
    tally = Tally()
    for values, counted in (([1.0, 2.0], [1.0, 0.0]), ([6.0, 8.0], [0.0, 1.0])):
        tally.add_total("loss", 0.25)
        tally.add_rows(
            {
                "logps/chosen": (torch.tensor(values), torch.tensor(counted)),
                "logps/rejected": (torch.tensor(values), torch.zeros(2)),
            },
            (),
        )
    assert summarise(tally, ALONE).values == {"loss": 0.5, "logps/chosen": 4.5}


def test_only_rewards_have_quantiles():
    assert set(tallied([1.0, 2.0], [])) == {"rewards/chosen", *(f"rewards/chosen/{q}" for q in ("p05", "p50", "p95"))}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float):
    assert not math.isfinite(tallied([1.0, bad], [])["rewards/chosen"])
    assert math.isnan(tallied([math.inf, -math.inf], [])["rewards/chosen"])


class TwoRanks(World):
    """What another rank has tallied comes after what this one has."""

    def gather(self, value: T) -> list[T]:
        return [value, ({}, {"rewards/margins": [4.0]}, [("d", 1)])]  # type: ignore[list-item]  # of a Tally


def test_every_pair_has_its_margin_whatever_rank_had_it():
    rows = data.to_train_pairs(data.bare_pairs(3))
    tally = Tally()
    for micro in (rows[:1], rows[1:]):
        own = torch.arange(float(len(micro)))
        tally.add_rows({"rewards/margins": (own, torch.ones_like(own))}, micro)
    margins = {(row.row_id, 0): value for row, value in zip(rows, (0.0, 0.0, 1.0), strict=True)}
    assert summarise(tally, ALONE).margins == margins
    assert summarise(tally, TwoRanks(0, 2)).margins == margins | {("d", 1): 4.0}


def test_rows_without_a_reference_have_no_margin():
    (row,) = data.to_train_pairs(data.bare_pairs(1))
    tally = Tally()
    tally.add_rows({"logps/chosen": (torch.ones(1), torch.ones(1))}, [row])
    assert summarise(tally, ALONE).margins == {}
