"""The steps of a round are linked: what it samples from, its reference, its rows, its schedule."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.iterate import IterateConfig
from prefpipe.stages.iterate import plan
from prefpipe.stages.iterate.plan import Known, Model
from tests.stages.iterate.cases import PER_ROUND, planned

OUT = Path("out")


def config(**changes: Any) -> IterateConfig:
    return IterateConfig.model_validate({"model": "m", "rounds": 3, **changes})


def round_of(config: IterateConfig, number: int, known: Known | None = None) -> dict[str, Any]:
    """The configs of the steps of a round, by folder."""
    steps = plan.steps(config, OUT, number, known or Known())
    return {step.name.partition("/")[2]: step.config for step in steps}


@settings(deadline=None, max_examples=20)
@given(rounds=st.integers(min_value=1, max_value=5), reference=st.sampled_from(("previous", "base")))
def test_steps_are_linked(rounds: int, reference: str) -> None:
    made = config(rounds=rounds, reference=reference)
    first, *steps = planned(made, OUT)
    assert (first.name, first.config.adapter) == ("round-0/evaluate", "none")
    assert [s.name for s in steps] == [f"round-{n}/{c}" for n in range(1, rounds + 1) for c in PER_ROUND]
    for number in range(1, rounds + 1):
        generate, build_pairs, train, evaluate = (s.config for s in steps[4 * (number - 1) : 4 * number])
        before = "none" if number == 1 else f"out/round-{number - 1}/train/adapter"
        assert generate.adapter == train.adapter == before
        assert evaluate.adapter == f"out/round-{number}/train/adapter"
        assert build_pairs.completions == (f"out/round-{number}/generate",)
        assert train.pairs == (f"out/round-{number}/build-pairs",)
        assert {generate.model, train.model, evaluate.model} == {"m"}
        assert generate.reference == ("base" if reference == "base" else "policy")
        assert train.reference_model == "policy"
        assert evaluate.round == number
    assert len({s.config.seed for s in steps if s.command == "generate"}) == rounds
    assert len({s.config.seed for s in steps if s.command == "train"}) == rounds
    assert {s.config.seed for s in steps if s.command == "evaluate"} == {made.evaluate.seed}


def test_settings_of_the_tables_reach_their_steps() -> None:
    made = config(generate={"num_samples": 3}, build_pairs={"min_gap": 0.5}, train={"beta": 0.7},
                  evaluate={"split": "all"})  # fmt: skip
    steps = round_of(made, 1)
    assert [steps["generate"].num_samples, steps["build-pairs"].min_gap, steps["train"].beta] == [3, 0.5, 0.7]
    assert steps["evaluate"].split == "all"


def test_rounds_of_full_fine_tuning_are_linked_by_models() -> None:
    full = config(train={"tuning": "full"})
    second = round_of(full, 2)
    assert [second[name].model for name in ("generate", "train", "evaluate")] == [
        *("out/round-1/train/model",) * 2, "out/round-2/train/model"]  # fmt: skip
    assert {second[name].adapter for name in ("generate", "train", "evaluate")} == {"none"}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_best_round_is_the_reference(tuning: str) -> None:
    """Sampling gives its log-probs where it is the round before; with an adapter to turn off, where it is the start."""
    made = config(reference="best", train={"tuning": tuning})
    before = round_of(made, 3, Known(best=2))
    assert (before["generate"].reference, before["train"].reference_model) == ("policy", "policy")
    assert "score" not in before
    start = round_of(made, 3, Known(best=0))
    assert start["generate"].reference == ("base" if tuning == "lora" else "none")
    assert ("score" in start) is (tuning == "full")
    first = round_of(made, 3, Known(best=1))
    trained = {"lora": Model("m", "out/round-1/train/adapter"), "full": Model("out/round-1/train/model")}[tuning]
    assert first["generate"].reference == "none"
    assert Model(first["score"].model, first["score"].adapter) == trained
    assert first["score"].inputs == ("out/round-3/generate",)
    assert first["build-pairs"].ref_logps == ("out/round-3/score",)
    named = ("policy" if tuning == "lora" else trained.model, trained.adapter)
    assert (first["train"].reference_model, first["train"].reference_adapter) == named


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_round_goes_on_with_the_optimizer_of_the_round_that_its_policy_is_from(tuning: str) -> None:
    """That is the round before, whichever one is the best or the reference."""
    fresh = config(reference="best", train={"tuning": tuning})
    on = fresh.model_copy(update={"optimizer": "continue"})
    for number in (1, 2, 3):
        trained = [round_of(made, number, Known(best=1 if number > 1 else 0))["train"] for made in (fresh, on)]
        before = f"out/round-{number - 1}/train" if number > 1 else "none"
        assert [t.optimizer_from for t in trained] == ["none", before]
        weights = trained[1].model if tuning == "full" and number > 1 else trained[1].adapter
        assert weights.removesuffix("/model").removesuffix("/adapter") == before
        assert trained[1].model_copy(update={"optimizer_from": "none"}) == trained[0]


def test_a_base_reference_of_full_fine_tuning_is_scored_by_the_model_of_the_start() -> None:
    made = config(reference="base", train={"tuning": "full"})
    assert "score" not in round_of(made, 1)
    second = round_of(made, 2)
    assert (second["score"].model, second["train"].reference_model) == ("m", "m")


def test_a_fixed_reference_is_a_model_or_an_adapter_on_the_model(tmp_path: Path) -> None:
    adapter, model = tmp_path / "a", tmp_path / "sft"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    steps = round_of(config(reference=f"fixed:{adapter}"), 1)
    assert (steps["score"].model, steps["score"].adapter) == ("m", str(adapter))
    assert (steps["train"].reference_model, steps["train"].reference_adapter) == ("policy", str(adapter))
    steps = round_of(config(reference=f"fixed:{model}"), 2)
    assert (steps["score"].model, steps["score"].adapter) == (str(model), "none")
    assert (steps["train"].reference_model, steps["train"].reference_adapter) == (str(model), "none")


def test_an_evaluation_is_compared_with_the_start_the_best_round_and_the_round_before() -> None:
    made = config(evaluate={"baseline": ["runs/other"]})
    known = (Known(), Known(), Known(best=1, evaluated=2))
    compared = [round_of(made, n, known[place])["evaluate"].baseline for place, n in enumerate((0, 1, 3))]
    names = [tuple(directory.removesuffix("/evaluate") for directory in found) for found in compared]
    assert names == [
        ("runs/other",), ("out/round-0", "runs/other"), ("out/round-0", "out/round-1", "out/round-2", "runs/other")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "leaves"),
    [
        ({"reward": ["length"]}, True),
        ({"reward": "length", "kl_to": ["base"]}, True),
        ({"reward": ["length", "refusal"]}, False),
        ({"reward": ["length"], "kl_to": ["base", "adapters/sft"]}, False),
        ({"reward": ["length"], "reward_settings": {"j": {"kind": "judge", "mode": "pairwise"}}, "judge": "j"}, False),
    ],
)
def test_an_engine_is_left_open_unless_others_need_its_memory(table: dict[str, Any], leaves: bool) -> None:
    assert plan.leaves_engine(config(evaluate=table)) is leaves


def test_a_round_that_is_not_evaluated_has_no_such_step() -> None:
    assert list(round_of(config(), 1, Known(evaluates=False))) == ["generate", "build-pairs", "train"]


def test_scoring_takes_what_sampling_may_make() -> None:
    steps = round_of(
        config(reference="fixed:x", generate={"max_tokens": 3000, "engine": "transformers", "check": 0}), 1
    )
    assert steps["score"].max_length == 3000 + 1024
    assert (steps["score"].engine, steps["score"].check) == ("transformers", 0)


def test_scoring_uses_the_machine_as_sampling_does() -> None:
    """Every setting that both have and that changes no result; a shard of prompts is none of rows."""
    table = {"max_num_seqs": 7, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "kv_cache_mib": 99}
    scoring = round_of(config(reference="fixed:x", generate={**table, "shard_rows": 3}), 1)["score"]
    assert {name: getattr(scoring, name) for name in table} == table
    assert scoring.shard_rows == type(scoring)().shard_rows


def test_from_the_base_on_the_union_of_rounds_needs_no_new_log_probs() -> None:
    third = round_of(config(start="base", replay=1, reference="base"), 3)
    assert (third["generate"].adapter, third["train"].adapter) == ("out/round-2/train/adapter", "none")
    assert third["train"].pairs == tuple(f"out/round-{n}/build-pairs" for n in (3, 1, 2))
    assert "replay" not in third
    assert third["train"].reference_model == "policy"


def test_from_the_base_the_policy_that_samples_is_a_reference_to_load() -> None:
    second = round_of(config(start="base"), 2)
    assert second["generate"].reference == "policy"
    named = ("policy", "out/round-1/train/adapter")
    assert (second["train"].reference_model, second["train"].reference_adapter) == named


@pytest.mark.parametrize(("reference", "share"), [("previous", 1.0), ("previous", 0.25), ("base", 0.25)])
def test_earlier_rows_are_scored_with_the_reference_of_the_round(reference: str, share: float) -> None:
    made = config(reference=reference, replay=share)
    assert "replay" not in round_of(made, 1)
    third = round_of(made, 3)
    scored = third["replay"]
    assert scored.inputs == ("out/round-1/build-pairs", "out/round-2/build-pairs")
    assert scored.adapter == ("none" if reference == "base" else "out/round-2/train/adapter")
    assert (scored.share, scored.reference) == (share, "policy")
    assert scored.seed != round_of(made, 2)["replay"].seed
    assert third["train"].pairs == ("out/round-3/build-pairs", "out/round-3/replay")


@pytest.mark.parametrize(("rounds", "oldest"), [(1, 5), (3, 3), (5, 1), (9, 1), (0, 1)])
def test_replay_may_be_of_the_newest_rounds_alone(rounds: int, oldest: int) -> None:
    """Whether their rows are scored anew or taken as they are."""
    newest = tuple(f"out/round-{n}/build-pairs" for n in range(oldest, 6))
    made = round_of(config(replay=0.5, replay_rounds=rounds), 6)
    assert made["replay"].inputs == newest
    as_they_are = round_of(config(replay=1, replay_rounds=rounds, reference="base"), 6)
    assert as_they_are["train"].pairs == ("out/round-6/build-pairs", *newest)


def test_rows_of_a_loss_without_reference_are_replayed_unscored() -> None:
    loss = {"loss_type": ["simpo"]}
    assert round_of(config(replay=0.5, train=loss), 2)["replay"].reference == "none"
    assert "replay" not in round_of(config(replay=1, train=loss), 2)


def test_schedules_go_by_round_and_keep_their_last_value() -> None:
    made = config(learning_rates=[3e-6, 2e-6], betas=[0.1, 0.2], temperatures=[0.7, 1.0], rounds=3)
    steps = [round_of(made, number) for number in (1, 2, 3)]
    assert [s["train"].learning_rate for s in steps] == [3e-6, 2e-6, 2e-6]
    assert [s["train"].beta for s in steps] == [s["build-pairs"].beta for s in steps] == [0.1, 0.2, 0.2]
    assert [s["generate"].temperature for s in steps] == [0.7, 1.0, 1.0]


def test_prompts_are_dealt_again_in_the_same_parts_with_other_seeds() -> None:
    made = config(prompts_per_round=4, repeat_prompts=True, rounds=9)
    tables = [round_of(made, number, Known(num_prompts=13))["generate"] for number in range(1, 8)]
    assert [table.part for table in tables] == [f"{n}/3" for n in (1, 2, 3, 1, 2, 3, 1)]
    assert len({table.seed for table in tables}) == 7
    assert {table.limit for table in tables} == {12}


@settings(deadline=None, max_examples=30)
@given(available=st.integers(1, 60), wanted=st.integers(1, 9), rounds=st.integers(1, 6))
def test_rounds_share_no_prompt_and_more_rounds_change_none(available: int, wanted: int, rounds: int) -> None:
    """The prompts as `read_prompts` and `Prompts.part` choose them: the first `limit`, then every N-th."""
    rounds = min(rounds, available // wanted)
    if not rounds:
        return
    chosen: list[range] = []
    for number in range(1, rounds + 1):
        table = round_of(config(prompts_per_round=wanted), number, Known(num_prompts=available))["generate"]
        first, _, step = table.part.partition("/")
        chosen.append(range(int(first) - 1, table.limit, int(step)))
    assert [len(part) for part in chosen] == [wanted] * rounds
    assert len({place for part in chosen for place in part}) == wanted * rounds
    assert max(place for part in chosen for place in part) < available
