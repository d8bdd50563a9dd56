"""The variants of a grid: every combination or draws, by readable names; what may not vary is refused with the nearest
setting that may."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe.config import base, grid
from prefpipe.config.train import TrainConfig

BASE = TrainConfig(pairs=("p",))


def names(*entries: str, samples: int = 0, config: TrainConfig = BASE) -> list[str]:
    return [variant.name for variant in grid.variants(config, entries, samples)]


def test_every_combination_in_the_order_of_the_grid() -> None:
    assert names("beta=0.03,1", "loss_type=sigmoid,ipo") == [
        "beta-0.03__loss_type-sigmoid", "beta-0.03__loss_type-ipo", "beta-1.0__loss_type-sigmoid",
        "beta-1.0__loss_type-ipo",
    ]  # fmt: skip
    (first, *_) = grid.variants(BASE, ["beta=0.03,1", "use-rslora=true,false"])
    assert first.changes == {"beta": 0.03, "use_rslora": True}
    assert (first.config.beta, first.config.use_rslora) == (0.03, True)
    assert first.config.model_copy(update={"beta": BASE.beta, "use_rslora": False}) == BASE


def test_lists_and_texts_with_commas() -> None:
    """A value of a list has its entries joined by +; a JSON list holds anything."""
    both = grid.variants(TrainConfig(loss_weights=(1.0,)), ["loss_type=sigmoid,ipo"])
    assert [v.config.loss_type for v in both] == [("sigmoid",), ("ipo",)]
    mixed = grid.variants(BASE, ["loss_type=sigmoid+nll", "loss_weights=1+0.1,1+0.5"])
    assert [v.config.loss_weights for v in mixed] == [(1.0, 0.1), (1.0, 0.5)]
    assert mixed[0].name == "loss_type-sigmoid-nll__loss_weights-1.0-0.1"
    named = grid.variants(BASE, ['lora_target_modules=["q_proj,v_proj", "all-linear"]'])
    assert [v.config.lora_target_modules for v in named] == ["q_proj,v_proj", "all-linear"]
    assert named[0].name.startswith("lora_target_modules-q_proj-v_proj-")  # with the digest of what a name cannot hold
    assert named[1].name == "lora_target_modules-all-linear"


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6, unique=True))
def test_names_tell_values_apart_and_fit_into_a_manifest(values: list[float]) -> None:
    found = names(f"beta={','.join(map(repr, values))}")
    assert len(set(found)) == len(values)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz_-.0123456789") for name in found)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["betta=0.1"], "unknown setting 'betta' (did you mean 'beta'?)"),
        (["learningrate=1"], "did you mean 'learning_rate'?"),
        (["beta=0.1,hot"], "beta = 'hot': Input should be a valid number"),
        (["lora_r=1.5"], "lora_r = '1.5': Input should be a valid integer"),
        (["loss_type=sigmoyd"], "did you mean 'sigmoid'?"),
        (["beta"], "beta has no values"),
        (["beta=0.1", "beta=0.2"], "beta is there twice"),
        (["pairs=a,b"], "pairs cannot vary: variants share their model, their rows"),
        (["max_length=10,20"], "max_length cannot vary"),
        (["dtype=float32,bfloat16"], "dtype cannot vary"),
        (["reference_model=a,b"], "reference_model cannot vary"),
        (["save_steps=1,2"], "save_steps cannot vary: it changes no result"),
        (["loss_type=sigmoid,kto"], "sigmoid trains on pairs and kto trains on labels"),
        (["beta=0.1,0.10"], "beta-0.1 and beta-0.1 are the same"),
        (["learning_rate=0,1e-5"], "are the same"),
        (["label_smoothing=0.1,0.2", "loss_type=sigmoid,ipo"], "label_smoothing = 0.1 is read by none of ipo"),
        (["beta=0.1..0.2"], "beta has a range"),
        (['lora_target_modules=["a'], "is no JSON list"),
        ([f"seed={','.join(map(str, range(40)))}", f"lora_r={','.join(map(str, range(1, 40)))}"], "1,560 variants"),
    ],
)
def test_what_cannot_be_is_refused(entries: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="grid") as error:
        names(*entries)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("loss_type=1..2", "loss_type is no number"),
        ("beta=2..1", "is empty"),
        ("beta=0..1:log", "begins at 0"),
        ("beta=1e..2", "no range of numbers"),
    ],
)
def test_a_range_that_is_none_is_refused(entry: str, said: str) -> None:
    with pytest.raises(ValueError, match="grid") as error:
        names(entry, samples=3)
    assert said in str(error.value)


def test_seeds_vary_where_they_draw_no_rows() -> None:
    assert names("seed=0,1") == ["seed-0", "seed-1"]
    with pytest.raises(ValueError, match="seed draws the rows of eval_split"):
        names("seed=0,1", config=TrainConfig(pairs=("p",), eval_split=0.1))
    with pytest.raises(ValueError, match="mismatched rows"):
        names("seed=0,1", config=TrainConfig(labels=("p",), loss_type=("kto",)))


def test_more_draws_add_to_those_before() -> None:
    """Another seed draws others; three digits of a number stand in its name, and it is what the name says."""
    entries = ["learning_rate=1e-6..1e-4:log", "lora_r=4..64", "loss_type=sigmoid,ipo"]
    few, many = names(*entries, samples=4), names(*entries, samples=9)
    assert many[:4] == few
    assert len(set(many)) == 9
    assert names(*entries, samples=4, config=TrainConfig(pairs=("p",), seed=1)) != few
    for variant in grid.variants(BASE, entries, 9):
        assert 1e-6 <= variant.config.learning_rate <= 1e-4
        assert 4 <= variant.config.lora_r <= 64
        assert f"learning_rate-{variant.config.learning_rate!r}" in variant.name
    with pytest.raises(ValueError, match="only 6 different"):
        names("lora_r=1..6", samples=7)
    with pytest.raises(ValueError, match="leave samples out"):
        names("lora_r=1,2", samples=3)


def test_a_logarithmic_range_is_even_in_its_logarithm() -> None:
    """A third of the draws in each of three decades, and half of those of an even range in its upper half."""
    source = random.Random(0)
    logs, even = grid.Range(1e-6, 1e-3, True, False), grid.Range(0.0, 10.0, False, False)
    drawn = [logs.draw(source) for _ in range(3000)]
    for low in (1e-6, 1e-5, 1e-4):
        assert sum(low <= value < 10 * low for value in drawn) / 3000 == pytest.approx(1 / 3, abs=0.04)
    assert sum(even.draw(source) > 5 for _ in range(3000)) / 3000 == pytest.approx(0.5, abs=0.04)


def test_every_setting_of_train_varies_or_says_why_not() -> None:
    """A new setting that changes the rows must stand among those that do not vary."""
    fixed = {name for name, _ in base.fields(TrainConfig)} - set(grid.swept())
    marked = {n for n, f in base.fields(TrainConfig) if base.PATH in f.metadata or base.RUNTIME in f.metadata}
    assert fixed - marked == {
        *("max_length", "max_prompt_length", "overlong", "special_tokens_in_prompts", "chat_template_kwargs"),
        *("template_changes", "column", "sft_column", "eval_split", "dtype", "load_in_4bit", "audit_rows"),
        *("kl_bank_size", "eval_steps", "merge"),
    }
