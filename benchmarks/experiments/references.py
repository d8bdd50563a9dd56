"""Does a reference that stays the start, or one that follows the policy, lead to the better policy?"""

from collections.abc import Mapping
from pathlib import Path

from experiments.bench import ENGINE, ONE_NAT, RIGHT_WRONG, Bench, Experiment, Hypothesis


def run(bench: Bench) -> None:
    """DPO with beta 1 and learning rate 3e-4. Two policies learn from the same completions, one with the start as its
    reference in every round, one with the policy that the round starts from; each of the two samples the completions
    once. Log-probs of a reference are computed by `score`. The first round is the same for both."""
    for seed in bench.scale.seeds:
        start = bench.evaluated_start(seed)
        completions = bench.generate(f"seed-{seed}/1-generate", start, seed)
        pairs = bench.step("build-pairs", f"seed-{seed}/1-pairs", completions=[completions], **RIGHT_WRONG)
        first = bench.train(f"seed-{seed}/1-train", start, pairs=[str(pairs)], seed=seed, **ONE_NAT)
        with bench.arm("round 1", seed) as evaluations:
            evaluations[seed] = bench.evaluate(f"seed-{seed}/round-1-evaluate", first, seed)
        for sampler in ("previous", "fixed"):
            policies = {"previous": first, "fixed": first}
            for number in range(2, bench.scale.rounds + 1):
                if sampler in policies:
                    policies = _reference_round(bench, policies, sampler, seed, number)


def _reference_round(
    bench: Bench, policies: Mapping[str, Path], sampler: str, seed: int, number: int
) -> dict[str, Path]:
    """The policies after one more round on the completions of `sampler`, with log-probs of each reference."""
    start, folder = bench.start(seed), f"seed-{seed}/{number}-{sampler}-samples"
    completions = bench.generate(f"{folder}-generate", policies[sampler], seed + 10 * number)
    pairs = bench.step("build-pairs", f"{folder}-pairs", completions=[completions], seed=number, **RIGHT_WRONG)
    after: dict[str, Path] = {}
    for reference, policy in policies.items():
        here = f"{folder}-{reference}"
        model = {"previous": policy, "fixed": start}[reference]
        other = {"reference_model": str(start)} if reference == "fixed" else {}
        with bench.arm(f"round {number}, {sampler} samples, {reference} reference", seed) as evaluations:
            scored = bench.step("score", f"{here}-score", model=str(model), inputs=[str(pairs)], check=0, **ENGINE)
            rows = {"pairs": [str(scored)], "seed": seed + number}
            trained = bench.train(f"{here}-train", policy, **rows, **other, **ONE_NAT)
            evaluations[seed] = bench.evaluate(f"{here}-evaluate", trained, seed)
            after[reference] = trained
    return after


HYPOTHESES = tuple(
    Hypothesis(measure, f"round {{last}}, {sampler} samples, fixed reference", -1,
               f"round {{last}}, {sampler} samples, previous reference", why)
    for sampler in ("previous", "fixed")
    for measure, why in (("kl", "the start holds the policy"), ("sampled", "what holds it lets it learn less"))
)  # fmt: skip

EXPERIMENT = Experiment("A fixed reference or the previous policy, on equal data", run, HYPOTHESES)
