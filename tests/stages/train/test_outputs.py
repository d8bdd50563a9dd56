"""What a run leaves: every weight trained and loaded by other tools, merged models, model cards; each of them a policy
that later stages take."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefpipe.config.score import ScoreConfig
from prefpipe.config.train import TrainConfig
from prefpipe.errors import IdentityError
from prefpipe.forward import load
from prefpipe.forward.logps import TreeModel
from prefpipe.models.policy import resolve
from prefpipe.runs import store
from prefpipe.schemas import Pair, RefLogps, from_table
from prefpipe.stages.score import stage as score
from prefpipe.stages.train import loading, loop, outputs, stage
from prefpipe.stages.train.micro_batches import tree_of
from tests.stages.train import data
from tests.stages.train.runs import metrics

FULL = {"tuning": "full", "lora_r": 16, "lora_alpha": 32, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs, half of them with the model's own log-probs."""
    bare = data.bare_pairs(10)
    known = data.with_reference(bare, tiny_model)
    return data.write_pairs(tmp_path_factory.mktemp("pairs") / "p", [*known[:5], *bare[5:]])


@pytest.fixture(scope="module")
def full(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every weight is trained."""
    out = tmp_path_factory.mktemp("full") / "t"
    stage.run(data.config(tiny_model, pairs, **FULL), out, force=False)
    return out


@pytest.fixture(scope="module")
def merged(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run with a merged model beside the adapter."""
    out = tmp_path_factory.mktemp("merged") / "t"
    stage.run(data.config(tiny_model, pairs, merge=True), out, force=False)
    return out


def hf_logps(model: Any, rows: list[Pair]) -> list[float]:
    """Log-probs of all completions by transformers' own forward, one sequence at a time."""
    found: list[float] = []
    for row in rows:
        for ids in (row.chosen_token_ids, row.rejected_token_ids):
            with torch.no_grad():
                logits = model(torch.tensor([[*row.prompt_token_ids, *ids]])).logits[0].log_softmax(-1)
            start = len(row.prompt_token_ids) - 1
            found.append(float(logits[start:-1].gather(1, torch.tensor(ids).unsqueeze(1)).sum()))
    return found


def test_every_weight_moves_and_step_0_is_ln_2(tiny_model: Path, full: Path):
    lines = metrics(full)
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[-1]["rewards/margins"] > 0.1
    before, after = (load_file(d / "model.safetensors") for d in (tiny_model, full / "model"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    manifest = store.read_manifest(full)
    assert manifest["identity"]["policy"] == resolve(str(full / "model")).id
    assert manifest["identity"]["reference"] == manifest["identity"]["initial"] == resolve(str(tiny_model)).id
    assert not (full / "adapter").exists()
    assert f"{full}/model" in stage.summary(manifest, full)[0]


def test_a_step_equals_plain_autograd_and_adamw(tiny_model: Path):
    """One step of DPO with every weight trained, against transformers' forward, autograd and torch's AdamW."""
    rows = data.with_reference(data.bare_pairs(4), tiny_model)
    config = data.config(tiny_model, **FULL, warmup_ratio=0.0, max_grad_norm=1e9, num_train_epochs=1)
    policy = resolve(str(tiny_model))
    trainer = data.trainer(loading.load_policy(policy, config), config)
    next(loop.steps(trainer, data.to_train_pairs(rows), 0))

    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    losses: list[torch.Tensor] = []
    for row in rows:
        sums: list[torch.Tensor] = []
        for ids in (row.chosen_token_ids, row.rejected_token_ids):
            logits = plain(torch.tensor([[*row.prompt_token_ids, *ids]])).logits[0].log_softmax(-1)
            start = len(row.prompt_token_ids) - 1
            sums.append(logits[start:-1].gather(1, torch.tensor(ids).unsqueeze(1)).sum())
        h = sums[0] - sums[1] - ((row.ref_chosen_logps or 0) - (row.ref_rejected_logps or 0))
        losses.append(-torch.nn.functional.logsigmoid(0.1 * h))
    torch.stack(losses).mean().backward()
    ours = {n.removeprefix("policy."): v for n, v in trainer.optimizer.state().items()}
    for name, parameter in plain.named_parameters():
        gradient = ours[f"exp_avg/policy.{name}"] / 0.1  # Adam's first moment after one step
        assert parameter.grad is not None
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name
    adamw.step()
    moved = dict(trainer.model.policy.named_parameters())
    difference = torch.cat([(moved[n] - p).flatten() for n, p in plain.named_parameters()])
    assert difference.norm() <= 1e-3 * 1e-3 * len(difference) ** 0.5  # a thousandth of a step of Adam


def test_transformers_loads_the_model_with_its_tokenizer_and_template(full: Path):
    tokenizer = AutoTokenizer.from_pretrained(full / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    model = AutoModelForCausalLM.from_pretrained(full / "model")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # tied, as the base is
    assert not any(p.suffix in (".bin", ".pt", ".pkl") for p in full.rglob("*"))
    last = load_file(full / "checkpoints" / "step-00000006" / "state.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, last[f"master/policy.{name}"])


def test_a_template_file_goes_with_the_model(tiny_model: Path, tmp_path: Path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    foreign = tmp_path / "pairs.jsonl"
    foreign.write_text("".join(
        json.dumps({"prompt": f"{n}?", "chosen": f"{n}!", "rejected": "no"}) + "\n" for n in range(4)
    ))  # fmt: skip
    config = data.config(tiny_model, foreign, **FULL, chat_template=str(tmp_path / "own.jinja"))
    stage.run(config, tmp_path / "t", force=False)
    saved = (tmp_path / "t" / "model" / "chat_template.jinja").read_text()
    assert saved == (tmp_path / "own.jinja").read_text()


def test_the_model_is_scored_and_trained_on_in_a_second_round(full: Path, pairs: Path, tmp_path: Path):
    """As --model of score (its values are those of transformers), and of another full run on these values."""
    config = ScoreConfig(
        model=str(full / "model"), inputs=(str(pairs),), engine="transformers", dtype="float32", check=0
    )
    score.run(config, tmp_path / "s", force=False)
    values = {
        r.completion_id: r.ref_logps
        for r in from_table(RefLogps, store.read_dataset(tmp_path / "s", "ref_logps", RefLogps))
    }
    rows = data.bare_pairs(10)
    expected = hf_logps(AutoModelForCausalLM.from_pretrained(full / "model"), rows)
    keys = [key for r in rows for key in (r.chosen_completion_id, r.rejected_completion_id)]
    assert [values[key] for key in keys] == pytest.approx(expected, abs=1e-3)
    again = data.config(full / "model", pairs, **FULL, ref_logps=(str(tmp_path / "s"),))
    manifest = stage.run(again, tmp_path / "t", force=False)
    assert metrics(tmp_path / "t")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert manifest["identity"]["initial"] == resolve(str(full / "model")).id


def test_bfloat16_masters_are_float32_and_the_saved_model_is_bfloat16(tiny_model: Path, pairs: Path, tmp_path: Path):
    bare = data.write_pairs(tmp_path / "p", data.bare_pairs(6))
    stage.run(data.config(tiny_model, bare, **FULL, dtype="bfloat16"), tmp_path / "t", force=False)
    saved = load_file(tmp_path / "t" / "model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    (last,) = sorted((tmp_path / "t" / "checkpoints").iterdir())[-1:]
    state = load_file(last / "state.safetensors")
    assert {t.dtype for name, t in state.items() if name.startswith("master/")} == {torch.float32}


def test_a_merged_model_computes_what_the_adapter_does(tiny_model: Path, merged: Path):
    rows = data.bare_pairs(4)
    plain = AutoModelForCausalLM.from_pretrained(merged / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), merged / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ours, theirs, before = (hf_logps(m, rows) for m in (plain, adapted, base))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(ours, before, strict=True)) > 0.1
    assert AutoTokenizer.from_pretrained(merged / "merged").chat_template
    assert "merged/model.safetensors" in store.read_manifest(merged)["files"]


def test_a_damaged_merged_model_is_made_again(tiny_model: Path, pairs: Path, merged: Path):
    file = merged / "merged" / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    stage.run(data.config(tiny_model, pairs, merge=True), merged, force=False)
    assert file.read_bytes() == good


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_the_model_card_says_data_loss_reference_metrics_and_how_to_load(tiny_model: Path, merged: Path, name: str):
    text = (merged / name / "README.md").read_text()
    manifest = store.read_manifest(merged)
    assert text.startswith("---\nlibrary_name: " + ("peft" if name == "adapter" else "transformers"))
    assert manifest["identity"]["reference"] in text
    assert manifest["inputs"]["pairs.0"] in text
    assert "10 pairs" in text
    assert "1 x sigmoid, beta 0.1" in text
    assert f"| rewards/margins | {metrics(merged)[-1]['rewards/margins']:.4g} |" in text
    assert (
        "PeftModel.from_pretrained" if name == "adapter" else 'AutoTokenizer.from_pretrained("PATH/merged")'
    ) in text


def test_a_card_without_reference_says_so(tiny_model: Path):
    config = TrainConfig(loss_type=("nll",), loss_weights=(1.0,))
    facts = {"count": 3, "kind": "pairs", "steps": 1, "initial": "weights:0", "reference": None, "inputs": {},
             "last_step": {"loss": 2.0}, "best": {"step": 1, "metric": "eval_loss", "value": 0.5}}  # fmt: skip
    text = outputs.card("adapter", "org/base", config, facts)
    assert "none (a reference-free loss)" in text
    assert "base_model: org/base" in text
    assert "Weights of step 1, the best by eval_loss (0.5)" in text


def test_tied_weights_are_named_once(tiny_model: Path):
    model = load.load_model(tiny_model, "float32")
    assert "lm_head.weight" not in load.model_tensors(model)
    assert set(load.model_tensors(model)) == set(load_file(tiny_model / "model.safetensors"))


def kept_and_state(tiny_model: Path, *, checkpointing: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a forward pass keeps for backward, and the optimizer's state after a few steps."""
    rows = data.to_train_pairs(data.with_reference(data.bare_pairs(6), tiny_model))
    config = data.config(tiny_model, **FULL)
    model: TreeModel = loading.load_policy(resolve(str(tiny_model)), config)
    if checkpointing:
        load.checkpoint_layers(model.policy)
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(model.layout([tree_of(r) for r in rows]))
    trainer = data.trainer(model, config)
    assert all(step.values["loss"] > 0 for step in loop.steps(trainer, rows, 0))
    return sum(sizes), trainer.optimizer.state()


def test_gradient_checkpointing_changes_no_bit_and_keeps_less(tiny_model: Path):
    without, with_it = (kept_and_state(tiny_model, checkpointing=on) for on in (False, True))
    assert with_it[0] < 0.5 * without[0]
    assert all(torch.equal(without[1][k], with_it[1][k]) for k in without[1])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
def test_qlora_trains_and_its_reference_is_the_model_in_4_bits(tiny_model: Path, tmp_path: Path):
    """Its own reference values make step 0 ln 2; values of the model in float32 are another scorer's, and refused."""
    bare = data.write_pairs(tmp_path / "p", data.bare_pairs(8))
    config = data.config(tiny_model, bare, load_in_4bit=True, merge=True, num_train_epochs=10)
    manifest = stage.run(config, tmp_path / "t", force=False)
    lines = metrics(tmp_path / "t")
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert manifest["identity"]["initial"] == resolve(str(tiny_model)).id
    made = from_table(RefLogps, store.read_dataset(tmp_path / "t", "ref_logps", RefLogps))
    assert {m.scorer for m in made} == {load.scorer_name("float32", in_4bit=True)}
    assert (
        load_file(tmp_path / "t" / "merged" / "model.safetensors").keys()
        == load_file(tiny_model / "model.safetensors").keys()
    )
    cached = data.write_pairs(tmp_path / "c", data.with_reference(data.bare_pairs(8), tiny_model))
    with pytest.raises(IdentityError, match="do not belong to this model"):
        stage.run(data.config(tiny_model, cached, load_in_4bit=True), tmp_path / "u", force=False)
