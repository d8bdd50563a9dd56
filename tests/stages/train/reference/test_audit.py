"""The audit: numbers derived by hand, and what it must refuse or let pass."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from prefpipe.errors import DataError, IdentityError
from prefpipe.forward.layout import Tree
from prefpipe.ids import ids_digest
from prefpipe.models import policy
from prefpipe.schemas import Pair
from prefpipe.stages.train import stage
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.reference.audit import (
    Audit,
    Score,
    audit,
    check,
    check_cached,
    check_scorers,
    noise_between_kernels,
)
from tests.stages.train import data

Values = tuple[float, ...]
LN2 = math.log(2)


def pair(number: int, chosen: Values, rejected: Values) -> TrainPair:
    """A pair whose token ids name it, so that a score function can look its values up."""
    ids = (
        tuple(1000 * number + i for i in range(len(chosen))),
        tuple(1000 * number + 500 + i for i in range(len(rejected))),
    )
    return TrainPair(f"p{number:03d}", "c", "r", (1, 2), ids[0], ids[1], chosen, rejected, 1.0)


def scorer(pairs: Sequence[TrainPair], change: Callable[[Values], Sequence[float]] = lambda v: v) -> Score:
    """A model whose log-probs are the values that `pairs` hold, changed."""
    known = {ids: v for p in pairs for ids, v in ((p.chosen, p.ref_chosen), (p.rejected, p.ref_rejected))}

    def score(trees: Sequence[Tree]) -> list[list[list[float]]]:
        return [[list(change(known[tuple(c)] or ())) for c in tree.completions] for tree in trees]

    return score


def many(count: int = 64, seed: int = 0) -> list[TrainPair]:
    """Pairs of 5 to 60 tokens with log-probs as a language model gives them: many near 0, a few far below."""
    generator = random.Random(seed)

    def values() -> Values:
        return tuple(-generator.expovariate(0.7) for _ in range(generator.randint(5, 60)))

    return [pair(i, values(), values()) for i in range(count)]


def test_numbers_derived_by_hand():
    """Model minus cache: chosen +0.2, -0.1; rejected +0.3. Signed mean 0.4 / 3, absolute 0.6 / 3, root mean square
    sqrt(0.14 / 3), h = 0.1 - 0.3 = -0.2.

    The step-0 loss at beta 0.5 is ln(1 + e^(0.1)).
    """
    cached = [pair(0, (-1.0, -2.0), (-3.0,))]
    now = scorer([replace(cached[0], ref_chosen=(-0.8, -2.1), ref_rejected=(-2.7,))])
    found = audit(cached, 8, now, beta=0.5)
    assert (found.rows, found.tokens) == (1, 3)
    assert found.signed_mean == pytest.approx(0.4 / 3)
    assert found.absolute_mean == pytest.approx(0.2)
    assert found.deviation == pytest.approx(math.sqrt(0.14 / 3))
    assert found.largest_h == pytest.approx(0.2)
    assert found.loss == pytest.approx(math.log(1 + math.exp(0.1)))
    assert found.to_dict()["tokens"] == 3


def test_what_a_row_must_hold_before_it_is_scored_again():
    """Log-probs above 0 only by rounding; at least one token in the prompt and in every completion."""
    good = pair(0, (-1.0, 9e-4), (-3.0,))
    check_cached(good)
    check_cached(replace(good, ref_chosen=None, ref_rejected=None))
    for wrong, words in (
        (replace(good, ref_chosen=(-1.0, 2e-3)), "row p000: .* is 0.002 nats"),
        (replace(good, rejected=(), ref_rejected=()), "row p000: completion r is empty"),
        (replace(good, rejected=(), ref_rejected=None), "row p000: completion r is empty"),
        (
            replace(good, rejected_mask=(False,) * len(good.rejected), ref_rejected=()),
            "r is empty, or no token is scored",
        ),
        (replace(good, prompt_ids=()), "row p000 has an empty prompt"),
    ):
        with pytest.raises(DataError, match=words):
            check_cached(wrong)


def test_the_largest_h_of_any_pair_counts_whatever_its_sign():
    """h = 0.5 and -2: the largest is 2; their losses at beta 1 are ln(1 + e^-0.5) and ln(1 + e^2)."""
    cached = [pair(0, (-1.0,), (-1.0,)), pair(1, (-1.0, -1.0), (-1.0,))]
    now = scorer([replace(cached[0], ref_chosen=(-0.5,)), replace(cached[1], ref_rejected=(1.0,))])
    found = audit(cached, 8, now, beta=1.0)
    assert found.largest_h == pytest.approx(2.0)
    assert found.loss == pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(2.0))) / 2)


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000])
def test_rows_are_spread_and_hold_the_longest_and_the_shortest(rows: int):
    pairs = many()
    seen: list[Tree] = []
    own = scorer(pairs)

    def watched(trees: Sequence[Tree]) -> list[list[list[float]]]:
        seen.extend(trees)
        return own(trees)

    found = audit(pairs, rows, watched, beta=0.1)
    assert found.rows == len(seen) == min(rows, 64)
    lengths = [sum(map(len, t.completions)) for t in seen]
    every = [len(p.chosen) + len(p.rejected) for p in pairs]
    assert lengths[0] == min(every)
    if rows > 1:
        assert lengths[-1] == max(every)
        assert len({t.completions for t in seen}) == len(seen)  # no row twice


def test_the_same_values_pass_everywhere_with_a_loss_of_ln_2():
    found = audit(many(), 32, scorer(many()), beta=0.1)
    assert (found.signed_mean, found.absolute_mean, found.largest_h) == (0, 0, 0)
    assert found.loss == pytest.approx(LN2)
    check(found, exact=True, full_precision=True)
    check(found, exact=False, full_precision=False)


def one_earlier(values: Values) -> Sequence[float]:
    """A mask that is off by one: every token has the log-prob of the token before it."""
    return [-5.0, *values[:-1]]


def without_eos(values: Values) -> Sequence[float]:
    """The end-of-sequence token is not counted (its value in the cache would be 0)."""
    return [*values[:-1], 0.0]


def scaled(values: Values) -> Sequence[float]:
    """The sampling distribution at temperature 1.1 instead of the raw one, roughly."""
    return [v / 1.1 for v in values]


def trained_a_little(values: Values) -> Sequence[float]:
    """4 AdamW steps at 1e-6 on the same rows move +0.031 per token (measured, notes/reliability.md B4)."""
    return [v + 0.031 for v in values]


@pytest.mark.parametrize("full_precision", [True, False], ids=["fp32", "bf16"])
@pytest.mark.parametrize("change", [one_earlier, without_eos, scaled, trained_a_little])
def test_faults_are_refused_in_both_precisions(change: Callable[[Values], Sequence[float]], full_precision: bool):
    pairs = many()
    found = audit(pairs, 64, scorer(pairs, change), beta=0.1)
    with pytest.raises(IdentityError) as caught:
        check(found, exact=False, full_precision=full_precision)
    assert caught.value.exit_code == 76
    assert "64 rows" in caught.value.message


@pytest.mark.parametrize("full_precision", [True, False], ids=["fp32", "bf16"])
def test_another_model_and_shuffled_rows_are_refused(full_precision: bool):
    """The right distribution in the wrong place: the signed mean is near 0, the absolute mean about 1.4."""
    pairs = many()
    generator = random.Random(5)

    def redrawn(values: Values) -> Sequence[float]:
        return [-generator.expovariate(0.7) for _ in values]

    def shuffled(values: Values) -> Sequence[float]:
        return generator.sample(values, len(values))

    for change in (redrawn, shuffled):
        found = audit(pairs, 64, scorer(pairs, change), beta=0.1)
        with pytest.raises(IdentityError):
            check(found, exact=False, full_precision=full_precision)


def noise(deviation: float) -> Callable[[Values], Sequence[float]]:
    generator = random.Random(9)
    return lambda values: [v + generator.gauss(0, deviation) for v in values]


def test_16_bit_kernel_noise_passes_in_16_bit_and_fails_in_32():
    """Measured between 16-bit kernels: mean 0, deviation 0.055 per token; its mean absolute value is 0.044 > 0.001."""
    pairs = many()
    found = audit(pairs, 32, scorer(pairs, noise(0.055)), beta=0.1)
    check(found, exact=False, full_precision=False)
    with pytest.raises(IdentityError):
        check(found, exact=False, full_precision=True)


def test_32_bit_kernel_noise_passes():
    """Between vLLM and transformers in fp32: 3e-5 per token at most; the same scorer stays below 1e-3 in h."""
    pairs = many()
    check(audit(pairs, 32, scorer(pairs, noise(1e-5)), beta=0.1), exact=True, full_precision=True)


def test_the_exact_rule_looks_at_single_pairs():
    """One pair of 64 off by 0.01 nat disappears in both means; the same fp32 scorer must give it back exactly."""
    pairs = many()
    off = [replace(pairs[0], ref_chosen=((pairs[0].ref_chosen or ())[0] + 0.01, *(pairs[0].ref_chosen or ())[1:]))]
    found = audit([*off, *pairs[1:]], 64, scorer(pairs), beta=0.1)
    check(found, exact=False, full_precision=True)
    with pytest.raises(IdentityError):
        check(found, exact=True, full_precision=True)


def values(**given: float) -> Audit:
    clean = Audit(rows=32, tokens=10**6, signed_mean=0.0, absolute_mean=0.0, deviation=0.0, largest_h=0.0, loss=LN2)
    return replace(clean, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "full_precision", "passes"),
    [
        ({"signed_mean": 0.0099}, False, True),
        ({"signed_mean": -0.0101}, False, False),
        ({"signed_mean": 0.021, "tokens": 100}, False, True),  # 4 x 0.055 / sqrt(100) = 0.022
        ({"signed_mean": 0.023, "tokens": 100}, False, False),
        ({"absolute_mean": 0.099}, False, True),
        ({"absolute_mean": 0.101}, False, False),
        ({"absolute_mean": 0.00099}, True, True),
        ({"absolute_mean": 0.00101}, True, False),
        ({"largest_h": 50.0}, False, True),
    ],
)
def test_thresholds(given: dict[str, float], full_precision: bool, passes: bool):
    if passes:
        check(values(**given), exact=False, full_precision=full_precision)
    else:
        with pytest.raises(IdentityError):
            check(values(**given), exact=False, full_precision=full_precision)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float, exact: bool):
    """NaN compares false with every limit: a check written as `> limit` would let it pass."""
    cached = [pair(0, (-1.0, -2.0), (-3.0,))]
    found = audit(cached, 8, scorer([replace(cached[0], ref_chosen=(-1.0, bad))]), beta=0.1)
    with pytest.raises(IdentityError):
        check(found, exact=exact, full_precision=True)


@pytest.mark.parametrize(("h", "beta"), [(-8000.0, 0.1), (-100.0, 10.0)])
def test_a_cache_that_is_far_off_is_refused_too(h: float, beta: float):
    """-beta h = 800 and 1000: e^800 overflows a float; the loss is 800 and 1000, and the answer is still a refusal."""
    cached = [pair(0, (-1.0,), (-1.0,))]
    found = audit(cached, 8, scorer([replace(cached[0], ref_chosen=(-1.0 + h,))]), beta=beta)
    assert found.loss == pytest.approx(-beta * h)
    with pytest.raises(IdentityError):
        check(found, exact=False, full_precision=False)


def test_a_cache_with_another_number_of_tokens_is_refused():
    """The end-of-sequence token has no cached value: an identity error, not a crash."""
    cached = [pair(0, (-1.0, -2.0), (-3.0,))]
    short = [replace(cached[0], ref_chosen=(-1.0,))]
    with pytest.raises(IdentityError):
        check(audit(short, 8, scorer(cached), beta=0.1), exact=False, full_precision=False)


def test_noise_is_what_was_measured_and_in_16_bits_no_less_than_between_kernels():
    """A cache of the same kernel shows none in the audit, and a training step of another shape has it all the same."""
    found = [noise_between_kernels(d, full_precision=full) for full in (True, False) for d in (0.0, 1e-5, 0.09)]
    assert found == [0.0, 1e-5, 0.09, 0.055, 0.055, 0.09]


MESSAGES = [([{"role": "user", "content": f"Tell me about bird {n}."}], f"Owl {n}.", f"No, {n}.") for n in range(8)]


def real_cache(directory: Path, template: str, tokens: int | None = None) -> list[Pair]:
    """Pairs whose prompts are rendered with `template`, with the model's values; `tokens` cuts completions first."""
    rows = data.bare_pairs(len(MESSAGES))
    found: list[Pair] = []
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for row, (messages, chosen, rejected) in zip(rows, MESSAGES, strict=True):
        prompt = tokenizer.encode(template.format(messages[0]["content"]), add_special_tokens=False).ids
        ids = [[*tokenizer.encode(text, add_special_tokens=False).ids, 2][:tokens] for text in (chosen, rejected)]
        found.append(replace_ids(row, prompt, *ids))
    return data.with_reference(found, directory)


def replace_ids(row: Pair, prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return replace(
        row, prompt_token_ids=prompt, chosen_token_ids=chosen, rejected_token_ids=rejected,
        chosen_ids_digest=ids_digest(prompt, chosen), rejected_ids_digest=ids_digest(prompt, rejected),
    )  # fmt: skip


TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def with_values_of(rows: Sequence[Pair], cached: Sequence[Pair]) -> list[Pair]:
    """Rows with the values that were cached for other rows, cut or repeated to their own numbers of tokens: what a
    cache without digests of its ids would give them."""

    def fitted(values: list[float] | None, ids: list[int]) -> list[float]:
        own = values or []
        return [own[min(i, len(own) - 1)] for i in range(len(ids))]

    return [
        data.with_values(
            row, fitted(old.ref_chosen_token_logps, row.chosen_token_ids),
            fitted(old.ref_rejected_token_logps, row.rejected_token_ids), old.reference, old.scorer or "",
        )
        for row, old in zip(rows, cached, strict=True)
    ]  # fmt: skip


def faulty(name: str, model: Path, other: Path) -> list[Pair]:
    """A cache that does not belong to the model, as injected faults make it."""
    good = real_cache(model, TEMPLATE)
    if name == "another model":
        own = policy.resolve(str(model)).id
        return [replace(row, reference=own) for row in data.with_reference(good, other)]
    if name == "template changed by one newline":
        return with_values_of(good, real_cache(model, TEMPLATE + "\n"))
    if name == "an earlier truncation":
        return with_values_of(good, real_cache(model, TEMPLATE, tokens=3))
    if name == "rows shuffled":
        return with_values_of(good, [*good[1:], good[0]])
    if name == "off-by-one mask":
        return [
            data.with_values(
                r, [-5.0, *(r.ref_chosen_token_logps or [])[:-1]], [-5.0, *(r.ref_rejected_token_logps or [])[:-1]],
                r.reference, r.scorer or "",
            )
            for r in good
        ]  # fmt: skip
    return [
        data.with_values(
            r, [*(r.ref_chosen_token_logps or [])[:-1], 0.0], [*(r.ref_rejected_token_logps or [])[:-1], 0.0],
            r.reference, r.scorer or "",
        )
        for r in good
    ]  # fmt: skip


@pytest.mark.parametrize("scorer_of", ["same", "other"])
@pytest.mark.parametrize(
    "fault",
    [
        "another model", "template changed by one newline", "an earlier truncation", "rows shuffled", "off-by-one mask",
        "EOS dropped",
    ],
)  # fmt: skip
def test_injected_faults_end_a_run_before_its_first_step(
    tiny_model: Path, other_model: Path, tmp_path: Path, fault: str, scorer_of: str
):
    """Through the whole stage, with a real model: digests and identity are right, only the values are not; whether
    they claim the same scorer (exact rule) or another one (means per token)."""
    rows = faulty(fault, tiny_model, other_model)
    if scorer_of == "other":
        rows = [replace(row, scorer="vllm/float32") for row in rows]
    pairs = data.write_pairs(tmp_path / "p", rows)
    with pytest.raises(IdentityError, match="do not belong to this model") as caught:
        stage.run(data.config(tiny_model, pairs), tmp_path / "t", force=False)
    assert caught.value.exit_code == 76
    assert not (tmp_path / "t" / "metrics.jsonl").exists()


def test_the_cache_without_a_fault_passes(tiny_model: Path, tmp_path: Path):
    pairs = data.write_pairs(tmp_path / "p", real_cache(tiny_model, TEMPLATE))
    manifest = stage.run(data.config(tiny_model, pairs, num_train_epochs=1), tmp_path / "t", force=False)
    assert manifest["totals"]["audit"]["largest_h"] < 1e-3


def test_the_reference_of_another_adapter_under_the_models_name_is_caught(tiny_model: Path, tmp_path: Path):
    """Values of base + adapter that claim to be the base's."""
    plain = data.write_pairs(tmp_path / "plain", real_cache(tiny_model, TEMPLATE))
    stage.run(data.config(tiny_model, plain), tmp_path / "first", force=False)
    moved = data.with_reference(real_cache(tiny_model, TEMPLATE), tiny_model, adapter=tmp_path / "first" / "adapter")
    claimed = [replace(row, reference=policy.resolve(str(tiny_model)).id) for row in moved]
    pairs = data.write_pairs(tmp_path / "p", claimed)
    with pytest.raises(IdentityError, match="do not belong to this model"):
        stage.run(data.config(tiny_model, pairs), tmp_path / "t", force=False)


def test_one_value_changed_on_disk_is_found_by_its_digest(tiny_model: Path, tmp_path: Path):
    """Rewritten with one other value, readable and with right checksums of pages: the manifest's digest knows."""
    pairs = data.write_pairs(tmp_path / "p", real_cache(tiny_model, TEMPLATE))
    (part,) = (pairs / "pairs").glob("*.parquet")
    table = pq.read_table(part)
    values = table.column("ref_chosen_logps").to_pylist()
    changed = pa.array([values[0] + 0.5, *values[1:]], type=pa.float32())
    column = table.schema.get_field_index("ref_chosen_logps")
    pq.write_table(table.set_column(column, table.schema.field(column), changed), part)
    with pytest.raises(DataError, match="do not match the digest") as caught:
        stage.run(data.config(tiny_model, pairs), tmp_path / "t", force=False)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("scorers", "refused"),
    [
        (["forward-2/bfloat16", "vllm-0.32.0/bfloat16", "fake-1"], False),
        ([], False),
        (["forward-1/bfloat16"], True),
        (["vllm-0.32.0/float32", "forward-3/float32-nf4"], True),
    ],
)
def test_values_of_another_version_of_the_scorer_are_refused(scorers: list[str], refused: bool) -> None:
    if not refused:
        check_scorers(scorers, 2)
        return
    with pytest.raises(IdentityError, match=r"made by scorer forward-[13]/.*, this is forward-2"):
        check_scorers(scorers, 2)
