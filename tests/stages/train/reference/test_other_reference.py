"""A reference that is not the initial policy: loaded first to check and to make its values, refused when it is another
one, or said to be unavailable."""

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.forward import load
from prefpipe.models.policy import resolve
from prefpipe.runs import store
from prefpipe.schemas import Pair, RefLogps, from_table, to_table
from prefpipe.stages.train import stage
from tests.conftest import Call
from tests.stages.train import data
from tests.tiny import make_adapter

FAST = ("--dtype", "float32", "--lora-r", 2, "--lora-alpha", 2, "--train-batch-size", 5)


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    return make_adapter(tiny_model, folder / "first", 1), make_adapter(tiny_model, folder / "second", 2)


@pytest.fixture(scope="module")
def of_other(other_model: Path) -> list[Pair]:
    """Ten pairs with the values of another model than the one that is trained."""
    return data.with_reference(data.bare_pairs(10), other_model)


@pytest.fixture(scope="module")
def pairs_of_other(of_other: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.write_pairs(tmp_path_factory.mktemp("other") / "p", of_other)


def training(model: Path, pairs: Path, out: Path, *flags: object) -> Sequence[object]:
    return ("train", "--model", model, "--pairs", pairs, *FAST, "--out", out, *flags)


def totals(out: Path) -> dict[str, Any]:
    return store.read_manifest(out)["totals"]


def first_line(out: Path) -> dict[str, float]:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


def test_the_values_are_checked_by_the_model_that_made_them(
    call: Call, tiny_model: Path, other_model: Path, of_other: list[Pair], pairs_of_other: Path, tmp_path: Path
):
    """The margin of step 0 is beta * h between two models, on the first five rows that the seed draws."""
    done = call(*training(tiny_model, pairs_of_other, tmp_path / "t", "--reference-model", other_model))
    assert done.code == 0, done.stderr
    assert "the cache belongs to the reference" in done.stderr
    assert "log-ratios are not 0 before step 0" in done.stderr
    manifest, reference = store.read_manifest(tmp_path / "t"), resolve(str(other_model)).id
    assert manifest["totals"]["audit"]["rows"] == 10
    assert manifest["totals"]["audit"]["largest_h"] < 1e-3
    assert manifest["identity"]["initial"] == resolve(str(tiny_model)).id
    assert manifest["identity"]["reference"] == manifest["inputs"]["reference"] == reference
    assert f"- reference: `{reference}`" in (tmp_path / "t" / "adapter" / "README.md").read_text()
    policy = data.with_reference(of_other, tiny_model)
    margins = [
        0.1 * ((p.ref_chosen_logps or 0) - (r.ref_chosen_logps or 0) - (p.ref_rejected_logps or 0)
               + (r.ref_rejected_logps or 0))
        for p, r in zip(policy, of_other, strict=True)
    ]  # fmt: skip
    found = first_line(tmp_path / "t")
    assert min(margins) < found["rewards/margins"] < max(margins)
    assert found["rewards/abs_margins"] > 0.1
    assert not [alert for alert in totals(tmp_path / "t")["alerts"] if alert["rule"] == "A0"]


def test_the_settings_are_named_where_the_reference_is_another_model(
    call: Call, tiny_model: Path, pairs_of_other: Path, tmp_path: Path
):
    done = call(*training(tiny_model, pairs_of_other, tmp_path / "t"))
    assert done.code == 76
    assert "(different: weights)" in done.stderr
    assert "--model and --adapter" in done.stderr
    assert "--reference-model and --reference-adapter" in done.stderr


def test_a_wrong_model_or_adapter_is_refused_by_name(
    call: Call, tiny_model: Path, other_model: Path, pairs_of_other: Path, adapters: tuple[Path, Path], tmp_path: Path
):
    own = data.with_reference(data.bare_pairs(4), tiny_model, adapter=adapters[0])
    of_adapter = data.write_pairs(tmp_path / "p", own)
    cases: list[tuple[Path, tuple[object, ...], str]] = [
        (pairs_of_other, ("--reference-model", tiny_model), "(different: weights)"),
        (pairs_of_other, ("--reference-adapter", adapters[0]), "(different: weights, adapter)"),
        (of_adapter, ("--reference-adapter", adapters[1]), "(different: adapter)"),
        (of_adapter, ("--reference-model", other_model), "(different: weights, adapter)"),
    ]
    for number, (pairs, flags, words) in enumerate(cases):
        done = call(*training(tiny_model, pairs, tmp_path / str(number), *flags))
        assert done.code == 76, (flags, done.stderr)
        assert words in done.stderr
        assert "the reference that is given is" in done.stderr
        assert not (tmp_path / str(number)).exists()


def test_a_policy_that_continues_one_adapter_with_the_values_of_another(
    call: Call, tiny_model: Path, adapters: tuple[Path, Path], tmp_path: Path
):
    own = data.with_reference(data.bare_pairs(6), tiny_model, adapter=adapters[0])
    pairs = data.write_pairs(tmp_path / "p", own)
    flags = ("--adapter", adapters[1], "--reference-adapter", adapters[0])
    done = call(*training(tiny_model, pairs, tmp_path / "t", *flags))
    assert done.code == 0, done.stderr
    identity = store.read_manifest(tmp_path / "t")["identity"]
    assert identity["reference"] == resolve(str(tiny_model), str(adapters[0])).id
    assert identity["initial"] == resolve(str(tiny_model), str(adapters[1])).id


@pytest.mark.parametrize("shift", [-0.05, 0.02])
def test_changed_values_of_the_right_reference_are_caught(
    call: Call, tiny_model: Path, other_model: Path, of_other: list[Pair], tmp_path: Path, shift: float
):
    """Names and digests are right; only the reference itself can tell."""

    def moved(values: list[float] | None) -> list[float]:
        return [v + shift for v in values or ()]

    rows = [
        data.with_values(
            r, moved(r.ref_chosen_token_logps), moved(r.ref_rejected_token_logps), r.reference, "x/float32"
        )
        for r in of_other
    ]
    pairs = data.write_pairs(tmp_path / "p", rows)
    done = call(*training(tiny_model, pairs, tmp_path / "t", "--reference-model", other_model))
    assert done.code == 76
    assert "do not belong to this model" in done.stderr
    assert not (tmp_path / "t" / "metrics.jsonl").exists()


@pytest.mark.parametrize("known", [0, 7], ids=["none are there", "some are there"])
def test_missing_values_are_those_that_score_gives(
    call: Call, tiny_model: Path, other_model: Path, of_other: list[Pair], tmp_path: Path, known: int
):
    bare = data.write_pairs(tmp_path / "bare", data.bare_pairs(10))
    done = call("score", "--model", other_model, "--inputs", bare, "--engine", "transformers", "--check", 0,
                "--dtype", "float32", "--out", tmp_path / "s")  # fmt: skip
    assert done.code == 0, done.stderr
    scored = {r.pair_id: r for r in from_table(Pair, store.read_dataset(tmp_path / "s", "pairs", Pair))}
    pairs = data.write_pairs(tmp_path / "p", [*of_other[:known], *data.bare_pairs(10)[known:]])
    done = call(*training(tiny_model, pairs, tmp_path / "t", "--reference-model", other_model))
    assert done.code == 0, done.stderr
    made = {r.completion_id: r for r in from_table(RefLogps, store.read_dataset(tmp_path / "t", "ref_logps", RefLogps))}
    assert len(made) == 2 * (10 - known)
    for row in data.bare_pairs(10)[known:]:
        expected = scored[row.pair_id]
        for key, values in (
            (row.chosen_completion_id, expected.ref_chosen_token_logps),
            (row.rejected_completion_id, expected.ref_rejected_token_logps),
        ):
            assert made[key].token_logps == pytest.approx(values, abs=2e-5)
            assert (made[key].reference, made[key].scorer) == (expected.reference, expected.scorer)


def test_the_base_as_the_reference_of_rows_without_values(
    call: Call, tiny_model: Path, adapters: tuple[Path, Path], tmp_path: Path
):
    """Named, it is the base and not the policy that makes them: with the adapter off, no second model is loaded."""
    pairs = data.write_pairs(tmp_path / "p", data.bare_pairs(4))
    flags = ("--adapter", adapters[0], "--reference-model", tiny_model)
    done = call(*training(tiny_model, pairs, tmp_path / "t", *flags))
    assert done.code == 0, done.stderr
    assert done.stderr.count("loading ") == 1
    expected = {r.chosen_completion_id: r for r in data.with_reference(data.bare_pairs(4), tiny_model)}
    made = from_table(RefLogps, store.read_dataset(tmp_path / "t", "ref_logps", RefLogps))
    for row in made:
        if row.completion_id in expected:
            assert row.token_logps == pytest.approx(expected[row.completion_id].ref_chosen_token_logps, abs=2e-5)
    assert {row.reference for row in made} == {resolve(str(tiny_model)).id}


def test_an_unavailable_reference_is_taken_as_it_is_and_said_to_be(
    call: Call, tiny_model: Path, other_model: Path, pairs_of_other: Path, tmp_path: Path
):
    """The same training as with the reference at hand; manifest, log and model card say what nobody checked."""
    for name, given in (("unchecked", "unavailable"), ("checked", other_model)):
        done = call(*training(tiny_model, pairs_of_other, tmp_path / name, "--reference-model", given))
        assert done.code == 0, done.stderr
        unchecked = "not whether that model gives these values" in done.stderr
        assert unchecked == (name == "unchecked")
    reference = resolve(str(other_model)).id
    found = store.read_manifest(tmp_path / "unchecked")
    assert found["totals"]["audit"]["rows"] == 0
    assert reference in found["totals"]["audit"]["not_checked"]
    assert found["identity"]["reference"] == reference
    assert found["inputs"]["reference"] == f"{reference} (values not checked)"
    assert "(values not checked)" in (tmp_path / "unchecked" / "adapter" / "README.md").read_text()
    weights = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("unchecked", "checked")]
    assert weights[0] == weights[1]
    again = call(*training(tiny_model, pairs_of_other, tmp_path / "checked", "--reference-model", "unavailable"))
    assert again.code == 2
    assert "input:reference" in again.stderr


def test_unavailable_does_not_excuse_what_can_be_checked(
    call: Call, tiny_model: Path, rows: list[Pair], of_other: list[Pair], tmp_path: Path
):
    """Values of the initial policy are audited all the same; missing ones cannot be made; references do not mix."""
    off = [data.with_values(r, [v - 0.05 for v in r.ref_chosen_token_logps or ()], r.ref_rejected_token_logps or [],
                            r.reference, r.scorer or "") for r in rows]  # fmt: skip
    bare = data.bare_pairs(10)
    cases = {
        "own": (off, 76, "do not belong to this model"),
        "missing": ([*of_other[:4], *bare[4:]], 65, "6 of 10 rows have no log-probs of their reference weights:"),
        "none": (bare, 65, "10 of 10 rows have no log-probs of their reference"),
        "two": ([*of_other[:4], *rows[4:]], 65, "2 references"),
        "length": ([replace(of_other[0], ref_chosen_token_logps=[-1.0]), *of_other[1:]], 76, of_other[0].pair_id),
    }
    for name, (kept, code, words) in cases.items():
        pairs = data.write_pairs(tmp_path / name, kept)
        done = call(*training(tiny_model, pairs, tmp_path / f"t-{name}", "--reference-model", "unavailable"))
        assert done.code == code, (name, done.stderr)
        assert words in done.stderr, name


def test_the_divergence_is_that_from_the_reference_that_sampled_the_rows(
    tiny_model: Path, other_model: Path, of_other: list[Pair], tmp_path: Path
):
    """Two random models are far apart from the first step on, and the rows say which of them they were sampled from."""
    reference = resolve(str(other_model)).id
    with store.open_run(tmp_path / "p", "build-pairs", BuildPairsConfig(), {"test": "1"}, force=False) as run_:
        run_.write_part("pairs", Pair, 0, to_table(Pair, of_other))
        run_.finish({"pairs": len(of_other)}, {"policies": [reference]})
    config = data.config(tiny_model, tmp_path / "p", num_train_epochs=1, reference_model=str(other_model))
    stage.run(config, tmp_path / "t", force=False)
    line = first_line(tmp_path / "t")
    assert line["kl/ref_policy"] == pytest.approx(-(line["rewards/chosen"] + line["rewards/rejected"]) / 0.2, abs=1e-4)
    assert abs(line["kl/ref_policy"]) > 1


def test_a_reference_that_no_loss_reads_is_refused(
    call: Call, tiny_model: Path, other_model: Path, pairs_of_other: Path, tmp_path: Path
):
    flags = ("--loss-type", "nll", "--reference-model", other_model)
    done = call(*training(tiny_model, pairs_of_other, tmp_path / "t", *flags))
    assert done.code == 2
    assert "read by none of nll" in done.stderr


def test_only_one_model_is_in_memory_at_a_time(
    tiny_model: Path, adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two are loaded; the reference, wrapped in an adapter, is gone when the policy begins to exist."""
    alive: list[weakref.ref[Any]] = []
    at_load: list[int] = []
    original = load.load_model

    def watched(*arguments: Any, **settings: Any) -> Any:
        at_load.append(sum(ref() is not None for ref in alive))
        model = original(*arguments, **settings)
        alive.append(weakref.ref(model))
        return model

    own = data.with_reference(data.bare_pairs(4), tiny_model, adapter=adapters[0])
    pairs = data.write_pairs(tmp_path / "p", own)
    monkeypatch.setattr(load, "load_model", watched)
    gc.disable()
    try:
        stage.run(data.config(tiny_model, pairs, reference_adapter=str(adapters[0])), tmp_path / "t", force=False)
    finally:
        gc.enable()
    assert at_load == [0, 0]
