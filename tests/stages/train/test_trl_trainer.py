"""Whole trainer runs against TRL's, run for real: same weights, adapter, token ids and order; losses step by step."""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, score
from prefpipe.stages.train import loop
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.micro_batches import global_batches
from tests.conftest import ROOT
from tests.stages.train import data

RUNS = {
    "sigmoid": {"beta": 0.1},
    "ipo": {"beta": 0.5, "ipo_reduction": "mean"},
    "sigmoid_norm": {"beta": 5.0},
    "hinge": {"beta": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "sigmoid weighted": {"beta": 0.1, "use_weighting": True},
}


@pytest.fixture(scope="module")
def trl(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/stages/train/trl_runs.py wrote, on forty pairs of text: the tokenizer is one token per byte."""
    if find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    folder = tmp_path_factory.mktemp("trl")
    source = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(source.choices("abcdefgh ", k=source.randint(low, high))).strip() or "a"

    lines = [
        {
            "prompt": [{"role": "user", "content": text(3, 20)}],
            "chosen": [{"role": "assistant", "content": text(1, 12)}],
            "rejected": [{"role": "assistant", "content": text(1, 12) + "!"}],
        }
        for _ in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.train.trl_runs", str(tiny_model), str(folder)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def in_order(rows: list[TrainPair], config: TrainConfig) -> list[TrainPair]:
    """The loop shuffles: place the rows so that it meets them in the order given here."""
    steps = global_batches([p.prompt_ids for p in rows], config.train_batch_size, config.seed, 0, together=False)
    order = [row for step in steps for row in step]
    return [rows[order.index(n)] for n in range(len(rows))]


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_of_a_loss_are_trls(trl: Path, tiny_model: Path, name: str):
    """LoRA, AdamW, clipping, float32: every loss of the first 20 steps within 1e-5 (relative above 1; WPO's weights are
    small on a model that did not make the texts, so that its losses are compared by their ratio)."""
    expected = json.loads((trl / "losses.json").read_text())[name]
    config = data.config(
        tiny_model, loss_type=(name.split()[0],), train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="constant",
        warmup_ratio=0.0, num_train_epochs=1, **RUNS[name],
    )  # fmt: skip
    base = load.load_model(tiny_model, "float32")
    model = TreeModel(load.load_adapter(base, trl / f"adapter-{name.replace(' ', '-')}", trainable=True))
    ids = [tuple(map(tuple, row)) for row in json.loads((trl / "ids.json").read_text())]
    with load.adapter_off(model.policy, off=True):
        values = list(score(model, [Tree(prompt, (chosen, rejected)) for prompt, chosen, rejected in ids]))
    rows = [
        TrainPair(str(n), f"{n}c", f"{n}r", prompt, chosen, rejected, tuple(v[0]), tuple(v[1]), 1.0)
        for n, ((prompt, chosen, rejected), v) in enumerate(zip(ids, values, strict=True))
    ]
    found = [m.values["loss"] for m in loop.steps(data.trainer(model, config), in_order(rows, config), 0)]
    assert len(found) == len(expected) == 20
    assert max(found) - min(found) > 1e-3 * max(found)  # it did train
    for mine, other in zip(found, expected, strict=True):
        assert abs(mine - other) <= (1e-3 * other if config.use_weighting else 1e-5 * max(1.0, abs(other)))
