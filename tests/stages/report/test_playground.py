"""The closed form by hand, where the sliders stand, and frames that the script can move a line in."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe.runs import overview
from prefpipe.schemas import Margin
from prefpipe.stages.report import playground
from prefpipe.stages.report.subject import Subject, number, read


def test_the_best_policy_by_hand() -> None:
    """Reference 1 : 3, rewards 1 and 0, beta 0.5: e^2 : 3."""
    best = playground.best_policy([math.log(0.25), math.log(0.75)], [1.0, 0.0], 0.5)
    assert best == pytest.approx([math.e**2 / (math.e**2 + 3), 3 / (math.e**2 + 3)])


@given(st.lists(st.tuples(st.floats(-500, 0), st.floats(-5, 5)), min_size=1, max_size=8))
def test_the_best_policy_is_a_distribution_between_reward_and_reference(rows: list[tuple[float, float]]) -> None:
    logps, rewards = [logp for logp, _ in rows], [reward for _, reward in rows]
    for beta in playground.POLICY_BETAS:
        assert sum(playground.best_policy(logps, rewards, beta)) == pytest.approx(1)
    reference = playground.best_policy(logps, [0.0] * len(rows), 1.0)
    assert playground.best_policy(logps, rewards, 1e9) == pytest.approx(reference, abs=1e-6)


def test_the_sliders_stand_where_the_run_does(subject: Subject) -> None:
    assert playground.playground(subject).start == {"loss": "sigmoid", "places": {"beta": 2, "label_smoothing": 0}}
    last = subject.runs[-2]
    assert last.command == "train"
    config = {**last.config, "loss_type": ["simpo"], "beta": 2.5, "simpo_gamma_beta_ratio": 0.3}
    other = replace(subject, runs=[replace(last, config=config)])
    places = {"beta": 2, "label_smoothing": 0, "simpo_gamma_beta_ratio": 1}
    assert playground.playground(other).start == {"loss": "simpo", "places": places}


def test_a_frame_has_one_line_for_the_script_to_move(subject: Subject) -> None:
    frames = playground.playground(subject).frames
    assert set(frames) == {"loss", "pull"}
    for name, frame in frames.items():
        assert frame.svg.count("mark-line") == 1
        assert f'id="{name}-clip' in frame.svg


def test_candidates_of_the_newest_completions(subject: Subject) -> None:
    found = playground.playground(subject)
    assert (found.reward, len(found.prompts)) == ("short_sentence", 12)
    rows = found.prompts[0].rows
    assert sum(row.reference for row in rows) == pytest.approx(1)
    assert all(len(row.best) == len(playground.POLICY_BETAS) for row in rows)


def test_the_margins_of_the_pairs_are_a_histogram_in_nats(subject: Subject, finished: Path) -> None:
    found = playground.playground(subject).margins
    assert found is not None
    rows = overview.rows(overview.look(finished / "round-2/train"), "margins", Margin, 100).rows
    nats = sorted(row["margin"] / 0.1 for row in rows)
    assert found.says.startswith(
        f"median {number(nats[12])} nats, {sum(v > 0 for v in nats) / 24:.1%} above 0; 24 pairs"
    )
    assert "trained on" in found.svg
    assert "held out" in found.svg
    for config in ({}, {"beta": 0.0}):
        run = replace(subject.runs[-2], config=config)
        assert playground.playground(replace(subject, runs=[run])).margins is None


def test_without_training_and_completions_the_curves_are_still_there(finished: Path) -> None:
    found = playground.playground(read(finished / "round-0/evaluate"))
    assert (found.margins, found.prompts, found.start["loss"]) == (None, [], "sigmoid")
