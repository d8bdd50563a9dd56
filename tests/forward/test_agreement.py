"""The limits of audit and parity by hand, and the buckets of lengths."""

import math

import pytest

from prefpipe.forward.agreement import LENGTH_BUCKETS, absolute_limit, signed_limit


@pytest.mark.parametrize(
    ("tokens", "limit"), [(0, 0.22), (1, 0.22), (100, 0.022), (484, 0.01), (485, 0.01), (10**6, 0.01)]
)
def test_few_tokens_are_allowed_the_noise_of_their_mean(tokens: int, limit: float):
    """Four standard errors of 0.055 nats: 0.22 / sqrt(n), down to 0.01 at 484 tokens."""
    assert signed_limit(tokens) == pytest.approx(limit)


def test_16_bits_are_allowed_a_hundred_times_as_much():
    assert (absolute_limit(full_precision=True), absolute_limit(full_precision=False)) == (0.001, 0.1)


def test_buckets_leave_no_length_out():
    assert [low for low, _ in LENGTH_BUCKETS] == [0, 64, 256, 1024]
    assert [high for _, high in LENGTH_BUCKETS] == [64, 256, 1024, math.inf]
