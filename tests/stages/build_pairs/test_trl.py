"""The real TRL trains on what --format trl writes: as it is, and with our ids and reference log-probs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import DataError
from prefpipe.runs import tables
from prefpipe.schemas import Message, Prompt
from prefpipe.stages.generate import stage as generate
from tests.conftest import ROOT
from tests.stages.build_pairs.runs import Row, build, ids_of, logps_of, run_of

LETTERS = "tests.e2e.letters:most_letters"
EXAMPLES = {"pairs": "trl_dpo.py", "labels": "trl_kto.py"}
# One process, since the import of TRL takes longer than all of its steps here.
RUNS = """
import runpy, sys
from pathlib import Path
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
model, out, root, *folders = sys.argv[1:]
for number, folder in enumerate(folders):
    rows = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", cache_dir=f"{out}/cache{number}")
    paired = "chosen" in rows.column_names
    config, trainer = (DPOConfig, DPOTrainer) if paired else (KTOConfig, KTOTrainer)
    arguments = config(output_dir=out, max_steps=1, per_device_train_batch_size=2, logging_steps=1, report_to="none",
                       save_strategy="no", use_cpu=True, bf16=False, learning_rate=1e-5)
    made = trainer(model=model, args=arguments, train_dataset=rows)
    made.train()
    print("first", Path(folder).parent.name, made.state.log_history[0]["loss"])
for folder, script in zip(folders, ("trl_dpo.py", "trl_kto.py")):
    print("script", script)
    sys.argv = [script, model, folder, f"{out}/{script}"]
    runpy.run_path(f"{root}/examples/{script}", run_name="__main__")
"""


@pytest.fixture(scope="module")
def sampled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts with four completions of the tiny model in fp32, and their log-probs."""
    out = tmp_path_factory.mktemp("sampled") / "g"
    config = GenerateConfig(
        model=str(tiny_model), prompts=str(ROOT / "data" / "prompts.jsonl"), engine="transformers", dtype="float32",
        limit=8, num_samples=4, max_tokens=12, rewards=(LETTERS,),
    )  # fmt: skip
    generate.run(config, out, force=False)
    return out


@pytest.fixture(scope="module")
def printed(sampled: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The lines of TRL on our files, as words: it trains on all, then the examples do. Away from the network."""
    folder, folders = tmp_path_factory.mktemp("trl"), list[Path]()
    kept = {"truncated_chosen": "keep", "special_tokens": "keep"}
    for form in ("trl", "trl-standard"):
        for output in EXAMPLES:
            build(folder / f"{form}-{output}", sampled, reward=LETTERS, output=output, format=form, **kept)
            folders.append(folder / f"{form}-{output}" / "trl")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNS, *map(str, (tiny_model, folder / "t", ROOT, *folders))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def test_trl_trains_on_the_files_as_they_are(printed: list[list[str]]) -> None:
    """Conversational and standard, paired and unpaired: one step each, DPO starts at ln 2."""
    losses = {words[1]: float(words[2]) for words in printed if words[:1] == ["first"]}
    assert set(losses) == {"trl-pairs", "trl-labels", "trl-standard-pairs", "trl-standard-labels"}
    assert losses["trl-pairs"] == pytest.approx(math.log(2), abs=1e-4)
    assert all(math.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize(("output", "first"), [("pairs", math.log(2)), ("labels", 0.5)])
def test_the_examples_use_our_ids_and_reference(printed: list[list[str]], output: str, first: float) -> None:
    """With the policy at the reference DPO is ln 2 and APO-zero 1/2: log-probs of other ids would show."""
    after = printed[printed.index(["script", EXAMPLES[output]]) :]
    losses = next(words[1:] for words in after if words[:1] == ["losses"])
    assert float(losses[0]) == pytest.approx(first, abs=2e-4)


def test_columns_and_values(tmp_path: Path) -> None:
    rows = [Row("p", "p0", 1.0, "good"), Row("p", "p1", 0.0, "bad", num_tokens=3)]
    run = run_of(tmp_path / "g", rows)
    build(tmp_path / "o", run, format="trl-standard")
    (row,) = tables.read_parquet(tmp_path / "o" / "trl" / "part-00000.parquet").to_pylist()
    assert row == {
        "prompt": "about p", "chosen": "good", "rejected": "bad", "prompt_ids": [1, 5], "chosen_ids": ids_of(rows[0]),
        "rejected_ids": ids_of(rows[1]), "ref_chosen_logps": logps_of(rows[0], "w").ref_logps,
        "ref_rejected_logps": logps_of(rows[1], "w").ref_logps, "reward_gap": 1.0,
    }  # fmt: skip
    build(tmp_path / "c", run, format="trl")
    (row,) = tables.read_parquet(tmp_path / "c" / "trl" / "part-00000.parquet").to_pylist()
    assert row["prompt"] == [{"role": "user", "content": "about p"}]
    assert row["chosen"] == [{"role": "assistant", "content": "good"}]


def test_plain_text_holds_no_conversation(tmp_path: Path) -> None:
    turns = [Message(role="system", content="Be kind."), Message(role="user", content="Hi")]
    rows = [Row("p", "p0", 1.0, "good"), Row("p", "p1", 0.0, "bad")]
    run = run_of(tmp_path / "g", rows, prompts=[Prompt("p", turns, None, "train", "", "{}")])
    with pytest.raises(DataError, match=r"1 rows are more than one user message .* \(first: prompt p\)"):
        build(tmp_path / "o", run, format="trl-standard")
    assert build(tmp_path / "c", run, format="trl")["totals"]["pairs"] == 1
