"""Rounds steer themselves: the best one is linked, rules stop them, more of them go on, others branch off."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefpipe.errors import DataError
from prefpipe.ids import content_id
from prefpipe.models.policy import resolve
from prefpipe.runs import manifests, store
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Completion
from prefpipe.stages.iterate import stage as iterate
from tests.stages.iterate import cases
from tests.stages.iterate.cases import PER_ROUND, Make, adapters, in_process, never


class Recorded:
    """A runner whose evaluations have recorded pass rates, greedy and sampled alike."""

    def __init__(self, *passed: float) -> None:
        self.passed = list(passed)
        self.ran: list[str] = []

    def __call__(self, command: str, saved: Path, out: Path) -> None:
        self.ran.append(f"{out.parent.name}/{out.name}")
        if (out / "manifest.json").exists():
            return
        in_process(command, saved, out)
        if command == "evaluate":
            rewrite(out, self.passed[int(out.parent.name[6:])])


def rewrite(out: Path, passed: float) -> None:
    """Give a run of evaluate another pass rate; its digest is made to fit."""
    manifest = store.read_manifest(out)
    for decoding in ("greedy", "sampled"):
        manifest["totals"][decoding] |= {"pass": passed, "low": passed - 0.02, "high": passed + 0.02}
    manifest["digest"] = manifests.digest(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_more_rounds_go_on_where_a_finished_run_ended(make: Make, three: tuple[Path, Manifest], tmp_path: Path) -> None:
    whole_out, whole = three
    out = tmp_path / "out"
    first = iterate.run(make(rounds=1), out, force=False, runner=in_process)
    before = {p: p.stat().st_mtime_ns for p in out.glob("round-*/*/manifest.json")}
    manifest = iterate.run(make(rounds=3), out, force=False, runner=in_process)
    assert len(first["totals"]["rounds"]) == 2
    assert manifest["digest"] != first["digest"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert adapters(out, 1) == adapters(whole_out, 1)
    assert [r["sampled"] for r in manifest["totals"]["rounds"]] == [r["sampled"] for r in whole["totals"]["rounds"]]
    assert json.loads((out / "config.json").read_text())["config"]["rounds"] == 3
    for rounds in (1, 2, 3):  # fewer are there already
        assert iterate.run(make(rounds=rounds), out, force=False, runner=never) == manifest


def test_a_run_of_before_goes_on_with_the_fingerprint_that_it_has(
    make: Make, tmp_path: Path, three: tuple[Path, Manifest]
) -> None:
    """The number of rounds was a part of the identity once. Such a run reads as complete, and goes on."""
    out = tmp_path / "out"
    config = make(rounds=1)
    iterate.run(config, out, force=False, runner=in_process)
    saved = json.loads((out / "config.json").read_text())
    del saved["record_id"]
    saved["identity"]["rounds"] = 1
    for name in ("launcher", "stop", "start", "replay", "from_run", "from_round"):
        del saved["config"][name]
    (out / "config.json").write_text(json.dumps(saved))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["fingerprint"] = content_id(saved["identity"])
    manifest["totals"] = {"rounds": manifest["totals"]["rounds"]}
    manifest["digest"] = manifests.digest(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "best").unlink(missing_ok=True)
    assert iterate.run(config, out, force=False, runner=never) == manifest
    assert "policy " in "\n".join(iterate.summary(manifest, out))
    longer = iterate.run(make(rounds=2), out, force=False, runner=in_process)
    assert longer["fingerprint"] == manifest["fingerprint"]
    assert len(longer["totals"]["rounds"]) == 3


@pytest.mark.parametrize(("passed", "best"), [((0.1, 0.5, 0.3), 1), ((0.1, 0.2, 0.3), 2), ((0.5, 0.2, 0.3), 0)])
def test_the_best_round_is_named_linked_and_shown(
    make: Make, tmp_path: Path, passed: tuple[float, ...], best: int
) -> None:
    out = tmp_path / "out"
    manifest = iterate.run(make(), out, force=False, runner=Recorded(*passed))
    assert manifest["totals"]["best"] == {"round": best, "metric": "sampled.pass", "value": passed[best]}
    assert (out / "best").is_symlink() is (best > 0)
    shown = "\n".join(iterate.summary(manifest, out))
    assert ("start" if best == 0 else str(best)) + " (best)" in shown
    if best == 0:
        assert "best: no round" in shown
        return
    assert (out / "best").resolve() == (out / f"round-{best}/train/adapter").resolve()
    assert resolve(str(make().model), str(out / "best")).adapter_weights is not None
    assert f"best: round {best}, sampled.pass {passed[best]}" in shown
    assert f"policy       {out}/best" in shown


def test_a_better_round_moves_the_link_and_a_worse_start_of_it_takes_it_away(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    iterate.run(make(rounds=1), out, force=False, runner=Recorded(0.1, 0.5))
    assert (out / "best").resolve().parts[-3] == "round-1"
    manifest = iterate.run(make(rounds=2), out, force=False, runner=Recorded(0.1, 0.5, 0.7))
    assert (out / "best").resolve().parts[-3] == "round-2"
    assert not [name for name in manifest["files"] if name.startswith("best")]


def test_a_rule_stops_the_rounds_and_says_why_and_what_next(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recorded = tmp_path / "out", Recorded(0.1, 0.5, 0.5, 0.49, 0.8)
    config = make(rounds=4, stop={"rules": ["gain"]})
    manifest = iterate.run(config, out, force=False, runner=recorded)
    stop = manifest["totals"]["stopped"]
    assert (stop["rule"], stop["round"], len(stop["why"])) == ("gain", 3, 2)
    assert len(manifest["totals"]["rounds"]) == 4
    assert not [name for name in recorded.ran if name.startswith("round-4")]
    assert "stopped after round 3 by rule gain: round 2: sampled.pass +0" in capsys.readouterr().err
    shown = "\n".join(iterate.summary(manifest, out))
    assert "stopped after round 3 by rule gain:" in shown
    assert "next: take the best round" in shown
    assert iterate.run(config, out, force=False, runner=never) == manifest  # nothing is left to do
    assert iterate.run(make(rounds=9, stop={"rules": ["gain"]}), out, force=False, runner=never) == manifest


def test_a_stopped_run_goes_on_with_other_rules(make: Make, tmp_path: Path) -> None:
    out, recorded = tmp_path / "out", Recorded(0.1, 0.1, 0.8)
    hasty = {"rules": ["gain"], "gain_rounds": 1}
    stopped = iterate.run(make(stop=hasty), out, force=False, runner=recorded)
    assert stopped["totals"]["stopped"]["round"] == 1
    manifest = iterate.run(make(stop={"rules": []}), out, force=False, runner=recorded)
    assert manifest["totals"]["stopped"] is None
    assert manifest["totals"]["best"]["round"] == 2
    again = iterate.run(make(rounds=3, stop=hasty), out, force=False, runner=Recorded(0.1, 0.1, 0.8, 0.7))
    assert len(again["totals"]["rounds"]) == 4  # round 2, which is there, counts, whatever the rule says of round 1
    assert again["totals"]["stopped"]["round"] == 3


def without_pairs(command: str, saved: Path, out: Path) -> None:
    """A runner in which every prompt of round 2 has answers of one kind."""
    if out.parent.name == "round-2" and command == "build-pairs":
        recipe = json.loads(saved.read_text())
        recipe["config"] |= {"reward": "tests.stages.iterate.cases:same"}
        saved.write_text(json.dumps(recipe))
    in_process(command, saved, out)


def test_a_round_without_a_pair_ends_the_rounds_before_it(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The share of mixed prompts is 0: the rounds before it are a result, and not an error."""
    both = {"rewards": [cases.REWARD, "tests.stages.iterate.cases:same"]}
    out, config = tmp_path / "out", make(rounds=3, stop={"rules": ["mixed"], "mixed_share": 0}, generate=both)
    manifest = iterate.run(config, out, force=False, runner=without_pairs)
    assert len(manifest["totals"]["rounds"]) == 2
    assert manifest["totals"]["stopped"]["why"] == ["round 2: no prompt has outcomes that differ (tie: 6)"]
    assert "stopped after round 1 by rule mixed" in capsys.readouterr().err
    again = iterate.run(config, out, force=False, runner=without_pairs)
    assert again == manifest
    with pytest.raises(DataError, match="no pair is left"):
        iterate.run(make(rounds=3, generate=both), out, force=False, runner=without_pairs)


def evaluated(manifest: Manifest) -> list[int]:
    return [totals["round"] for totals in manifest["totals"]["rounds"]]


def test_every_second_round_is_evaluated_and_the_last_one(
    make: Make, tmp_path: Path, three: tuple[Path, Manifest]
) -> None:
    """Training is what it is with an evaluation of every round."""
    out, passed = tmp_path / "out", (0.1, 0.9, 0.5, 0.4)
    manifest = iterate.run(make(rounds=3, evaluate_every=2), out, force=False, runner=Recorded(*passed))
    assert evaluated(manifest) == [0, 2, 3]
    assert manifest["totals"]["best"]["round"] == 2
    assert manifest["identity"]["round-3/train"] == three[1]["identity"]["round-3/train"]
    compared = json.loads((out / "round-3/evaluate.json").read_text())["config"]["baseline"]
    assert compared == [str(out / f"round-{n}/evaluate") for n in (0, 2)]
    shown = "\n".join(iterate.summary(manifest, out))
    assert "| 2 (best) |" in shown
    assert "with --rounds 4" in shown
    assert iterate.run(make(rounds=3, evaluate_every=2), out, force=False, runner=never) == manifest
    branched = make(rounds=2, evaluate_every=2, from_run=str(out), from_round=1)
    assert evaluated(iterate.run(branched, tmp_path / "b", force=False, runner=in_process)) == [0, 2]


def test_a_last_round_stays_evaluated_when_others_follow(make: Make, tmp_path: Path) -> None:
    for rounds, found in ((1, [0, 1]), (3, [0, 1, 3])):
        made = make(rounds=rounds, evaluate_every=5)
        assert evaluated(iterate.run(made, tmp_path / "out", force=False, runner=in_process)) == found


def test_the_last_policy_is_evaluated_where_a_round_has_nothing_to_train_on(make: Make, tmp_path: Path) -> None:
    both = {"rewards": [cases.REWARD, "tests.stages.iterate.cases:same"]}
    out, config = tmp_path / "out", make(rounds=5, evaluate_every=5, stop={"rules": ["mixed"]}, generate=both)
    manifest = iterate.run(config, out, force=False, runner=without_pairs)
    assert evaluated(manifest) == [0, 1]
    assert iterate.run(config, out, force=False, runner=without_pairs) == manifest


def test_rules_see_what_a_real_evaluation_counts(make: Make, tmp_path: Path) -> None:
    """The base of the fake engine has other log-probs than a policy with an adapter: a divergence from round 1 on."""
    out = tmp_path / "out"
    config = make(stop={"rules": ["kl"], "kl_cap": 0.1}, evaluate={"kl_to": ["base"]})
    manifest = iterate.run(config, out, force=False, runner=in_process)
    assert manifest["totals"]["stopped"]["round"] == 1
    assert "nats from base, cap 0.1" in manifest["totals"]["stopped"]["why"][0]
    assert manifest["totals"]["rounds"][0]["kl"][0]["per_sequence"]["k1"] == 0
    (comparison,) = manifest["totals"]["rounds"][1]["comparisons"]
    assert (comparison["baseline"], comparison["round"]) == (manifest["identity"]["round-0/evaluate"], 0)


def test_a_leak_is_refused_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are trained on too"):
        iterate.run(make(evaluate={"split": "all"}), tmp_path / "out", force=False, runner=never)
    assert not (tmp_path / "out").exists()


def test_rounds_have_prompts_of_their_own_and_replay_a_share_of_earlier_pairs(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sampling = {"max_tokens": 24, "num_samples": 4}
    config = make(
        prompts_per_round=2, replay=0.5, rounds=3, temperatures=[1.0, 0.5], betas=[2.0, 3.0], generate=sampling
    )
    iterate.run(config, out, force=False, runner=in_process)
    prompts = [set(prompts_of(out / f"round-{n}/generate")) for n in (1, 2, 3)]
    assert [len(p) for p in prompts] == [2, 2, 2]
    assert len(set.union(*prompts)) == 6
    assert sorted(p.name for p in (out / "round-3").iterdir() if p.is_dir()) == sorted([*PER_ROUND, "replay"])
    earlier = {key for n in (1, 2) for key in pairs_of(out / f"round-{n}/build-pairs")}
    replayed = set(pairs_of(out / "round-3/replay"))
    assert replayed <= earlier
    trained = store.read_manifest(out / "round-3/train")["totals"]["pairs"]
    assert trained == len(pairs_of(out / "round-3/build-pairs")) + len(replayed)
    settings = [json.loads((out / f"round-{n}/train.json").read_text())["config"]["beta"] for n in (1, 2, 3)]
    assert settings == [2.0, 3.0, 3.0]


def prompts_of(run: Path) -> list[str]:
    return store.read_dataset(run, "completions", Completion, ["prompt_id"])["prompt_id"].to_pylist()


def pairs_of(run: Path) -> list[str]:
    return [key for p in sorted((run / "pairs").glob("*.parquet")) for key in pq.read_table(p)["pair_id"].to_pylist()]


@pytest.mark.parametrize("reference", ["best", "fixed", "base"])
def test_earlier_pairs_are_scored_with_the_reference_of_the_round(
    make: Make, tiny_model: Path, tmp_path: Path, three: tuple[Path, Manifest], reference: str
) -> None:
    """A real engine and DPO: training audits every value against the reference, so a stale one would be refused."""
    fixed = three[0] / "round-3/train/adapter"
    config = make(
        reference=f"fixed:{fixed}" if reference == "fixed" else reference,
        start="base",
        replay=0.99 if reference == "base" else 1.0,
        train={"loss_type": ["sigmoid"]},
        generate={"engine": "transformers"},
        evaluate={"engine": "fake"},
    )
    out = tmp_path / "out"
    iterate.run(config, out, force=False, runner=Recorded(0.1, 0.5, 0.4) if reference == "best" else in_process)
    trained = {n: store.read_manifest(out / f"round-{n}/train") for n in (1, 2)}
    base_id = resolve(str(tiny_model)).id
    expected = {
        "base": [base_id, base_id],
        "best": [base_id, trained[1]["identity"]["policy"]],
        "fixed": [resolve(str(tiny_model), str(fixed)).id] * 2,
    }[reference]
    assert [trained[n]["identity"]["reference"] for n in (1, 2)] == expected
    assert {trained[n]["identity"]["initial"] for n in (1, 2)} == {base_id}
    assert trained[2]["totals"]["pairs"] > trained[1]["totals"]["pairs"]
