"""What do rounds with a verifier gain, with and without NLL, and with flipped labels?"""

from typing import Any

from experiments.bench import NLL, REWARD, RIGHT_WRONG, Bench, Experiment, Hypothesis

# Arm -> settings of train and of build-pairs. The reward of the flipped labels is the negative one.
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DPO": ({"loss_type": ["sigmoid"]}, {}),
    "DPO + NLL": (NLL, {}),
    "DPO + NLL, flipped labels": (NLL, {"reward": f"-1*{REWARD}", "correct_reward": -0.95}),
}


def run(bench: Bench) -> None:
    """Rounds on pairs of a right and a wrong answer, each with the policy that samples as its reference; learning rate
    3e-4, and beta 0.1, which is TRL's default and asks answers of three tokens for ten nats."""
    for seed in bench.scale.seeds:
        start = bench.evaluated_start(seed)
        first = bench.generate(f"seed-{seed}/1-generate", start, seed)
        for name, (loss, labels) in ARMS.items():
            policy, slug = start, name.replace(" ", "").replace(",", "-")
            for number in range(1, bench.scale.rounds + 1):
                here = f"seed-{seed}/{number}-{slug}"
                with bench.arm(f"round {number}, {name}", seed) as evaluations:
                    samples = first if number == 1 else bench.generate(f"{here}-generate", policy, seed + 10 * number)
                    pairs = bench.step(
                        "build-pairs", f"{here}-pairs", completions=[samples], seed=number, **{**RIGHT_WRONG, **labels}
                    )
                    rows = {"pairs": [str(pairs)], "seed": seed + number, "beta": 0.1, "learning_rate": 3e-4}
                    policy = bench.train(f"{here}-train", policy, **rows, **loss)
                    evaluations[seed] = bench.evaluate(f"{here}-evaluate", policy, seed)
                if seed not in evaluations:
                    break  # without this round there is no next one


HYPOTHESES = (
    Hypothesis("sampled", "round {last}, DPO + NLL", 1, "start", "right answers get likelier"),
    Hypothesis("sampled", "round {last}, DPO + NLL", 1, "round {last}, DPO", "at beta 0.1 DPO displaces right answers"),
    Hypothesis("sampled", "round {last}, DPO + NLL, flipped labels", -1, "start", "the control: it is the labels"),
)

EXPERIMENT = Experiment("Rounds with a verifier, with and without NLL", run, HYPOTHESES)
