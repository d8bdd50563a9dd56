"""Runs to look at: completions of two rewards, their pairs, two evaluations, all of the fake engine."""

import json
from pathlib import Path

import pytest

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.stages.build_pairs import stage as build_pairs
from prefpipe.stages.evaluate import stage as evaluate
from prefpipe.stages.generate import stage as generate

LETTERS = "tests.e2e.letters:most_letters"
HOSTILE = "[bold]</pre><script>alert(1)</script>\x1b[31m\u202e{{x}}"


@pytest.fixture(scope="session")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the runs g (completions), p (pairs), e and f (evaluations, f of one prompt less)."""
    root = tmp_path_factory.mktemp("runs")
    prompts = root / "prompts.jsonl"
    topics = ["kettle", "owl", HOSTILE, "rain", "salt", "harp"]
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {t}.", "split": "train"}) + "\n" for t in topics))
    sampling = {"model": str(tiny_model), "prompts": str(prompts), "engine": "fake", "max_tokens": 12}
    rewards = (LETTERS, "short_sentence")
    config = GenerateConfig.model_validate({**sampling, "rewards": rewards, "num_samples": 3, "check": 0})
    generate.run(config, root / "g", force=False)
    pairing = {"completions": [str(root / "g")], "reward": LETTERS, "truncated_chosen": "keep"}
    build_pairs.run(BuildPairsConfig.model_validate(pairing), root / "p", force=False)
    rated = {**sampling, "split": "train", "reward": LETTERS, "pass_reward": 0.2}
    evaluate.run(EvaluateConfig.model_validate(rated), root / "e", force=False)
    evaluate.run(EvaluateConfig.model_validate({**rated, "limit": 5, "seed": 1}), root / "f", force=False)
    return root
