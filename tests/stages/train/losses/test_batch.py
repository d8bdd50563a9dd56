"""Batches refuse tensors that would broadcast into something else, and know what they lack."""

import pytest
import torch

from prefpipe.stages.train.losses.batch import LabelBatch, Logps, PairBatch, RankBatch

ONE = torch.ones(1)


@pytest.mark.parametrize("shape", [(2,), (1, 1), ()])
def test_log_probs_of_different_shapes_are_refused(shape: tuple[int, ...]):
    """A [B] beside a [B, 1] would broadcast to [B, B] without a word."""
    for other in ({"lengths": torch.ones(shape)}, {"lengths": ONE, "reference_logps": torch.ones(shape)}):
        with pytest.raises(ValueError, match="different shapes"):
            Logps(ONE, **other)  # type: ignore[arg-type]  (names of tensors)


def test_every_kind_of_batch_checks_its_shapes():
    own, flat, square = Logps(ONE, ONE), Logps(torch.ones(2), torch.ones(2)), Logps(torch.ones(1, 1), torch.ones(1, 1))
    for chosen, rejected, prob in ((own, flat, None), (square, square, None), (own, own, torch.ones(2))):
        with pytest.raises(ValueError, match=r"\[B\]"):
            PairBatch(chosen, rejected, preference_prob=prob)
    for completion, desirable, z0 in ((own, torch.tensor([True, False]), ONE[0]), (own, torch.tensor([True]), ONE)):
        with pytest.raises(ValueError, match="z0 is a scalar"):
            LabelBatch(completion, desirable, z0)
    for completions, present in ((own, torch.tensor([True])), (square, torch.ones(1, 2).bool())):
        with pytest.raises(ValueError, match=r"\[B, K\]"):
            RankBatch(completions, present)


def test_means_and_ratios():
    """-6 over 3 tokens is -2; without tokens 0, not NaN; the ratio to -4 is -2."""
    given = Logps(torch.tensor([-6.0, 0.0]), torch.tensor([3.0, 0.0]), torch.tensor([-4.0, 0.0]))
    assert given.mean_logps.tolist() == [-2.0, 0.0]
    assert given.log_ratios.tolist() == [-2.0, 0.0]
    with pytest.raises(ValueError, match="needs reference log-probs"):
        _ = Logps(ONE, ONE).log_ratios
