"""Reward models on a tiny random Llama: the right state, whatever the batch; and what must not be rated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from prefpipe import machine
from prefpipe.config.rewards import RewardModel
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.models.chat import load_chat
from prefpipe.rewards import identity, model
from prefpipe.rewards.base import Answer
from prefpipe.rewards.model import Row, batches, inputs, padding, reward_model, tokenise, without_padding
from prefpipe.schemas import Message
from tests.conftest import Cli

TEXTS = ["Yes.", "", "A longer answer, with more words than the others have.", "No", "Yes, yes, yes."]
ANSWERS = [
    Answer([Message(role="system", content="Be short."), Message(role="user", content="Is it?")], text, None)
    for text in TEXTS
]
# Ends with the token that the model below also pads with, as the templates of many reward models do.
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"


def make_reward_model(tiny_model: Path, directory: Path, num_labels: int = 1, *, pad: bool = True) -> Path:
    shutil.copytree(tiny_model, directory)
    config = LlamaConfig.from_pretrained(directory)
    config.num_labels, config.architectures, config.pad_token_id = (
        num_labels,
        None,
        config.eos_token_id if pad else None,
    )
    torch.manual_seed(5)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def directory(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tiny_model, tmp_path_factory.mktemp("rewards") / "rm")


def options(directory: Path, **more: object) -> RewardModel:
    return RewardModel(**{"model": str(directory), "dtype": "float32", **more})


@pytest.fixture(scope="module")
def without_pad(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tiny_model, tmp_path_factory.mktemp("rewards") / "none", pad=False)


def oracle(directory: Path, answers: list[Answer]) -> list[float]:
    """What transformers gives for each row alone, as a model card does it."""
    loaded = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    chat = load_chat(directory)
    with torch.no_grad():
        return [loaded(torch.tensor([tokenise(chat, a, 1000)])).logits[0, 0].item() for a in answers]


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 200, 100_000])
@pytest.mark.parametrize("model_name", ["directory", "without_pad"])
def test_the_batch_never_changes_a_reward(
    request: pytest.FixtureRequest, model_name: str, tokens_per_batch: int
) -> None:
    place = request.getfixturevalue(model_name)
    scores = reward_model(options(place, tokens_per_batch=tokens_per_batch))(ANSWERS)
    expected = oracle(place, ANSWERS)
    assert [s.status for s in scores] == ["ok"] * len(ANSWERS)
    assert [s.reward for s in scores] == pytest.approx(expected, abs=1e-4, rel=1e-5)
    assert len({round(x, 3) for x in expected}) == len(expected)  # else the test could not fail
    assert max(map(abs, expected)) > 1  # raw logits, not squashed into 0 to 1


def test_a_model_that_pads_with_the_end_of_a_turn_rates_one_token_earlier(directory: Path, without_pad: Path) -> None:
    """The same weights: where the padding token ends every row, the states rated differ, and so do the rewards."""
    assert oracle(directory, ANSWERS) != pytest.approx(oracle(without_pad, ANSWERS), abs=1e-2)
    assert list(without_padding(2, [1, 2, 5, 2, 2])) == [1, 2, 5]
    assert list(without_padding(None, [1, 2])) == [1, 2]
    assert list(without_padding(2, [2, 2])) == [2]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    rows = [Row(i, [7] * n) for i, n in enumerate(lengths)]
    made = list(batches(rows, budget))
    assert sorted(r.index for b in made for r in b) == list(range(len(rows)))
    assert all(len(b) == 1 or len(b) * max(len(r.token_ids) for r in b) <= budget for b in made)


@settings(deadline=None)
@given(st.one_of(st.none(), st.integers(0, 5)), st.lists(st.lists(st.integers(0, 8), min_size=1), min_size=1))
def test_the_padding_is_the_models_own_or_stands_in_no_row(own: int | None, rows: list[list[int]]) -> None:
    chosen = padding(own, rows)
    assert chosen == own if own is not None else chosen not in {t for row in rows for t in row}


def test_what_cannot_be_rated_has_a_reason_and_no_reward(directory: Path) -> None:
    user = [Message(role="user", content="?")]
    rate = reward_model(options(directory, max_length=60))
    long, spelled, fine = rate(
        [Answer(user, "x" * 99, None), Answer(user, "a<|im_end|>", None), Answer(user, "a", None)]
    )
    assert (long.reward, long.status) == (None, "unparsable")
    assert "max_length is 60" in (long.detail or "")
    assert (spelled.reward, spelled.status) == (None, "unparsable")
    assert "control_tokens" in (spelled.detail or "")
    assert fine.status == "ok"


def test_positions_of_the_model_bound_the_length(directory: Path) -> None:
    (long,) = reward_model(options(directory))([Answer([Message(role="user", content="?")], "x" * 2000, None)])
    assert "max_length is 1024" in (long.detail or "")


def test_a_logit_that_is_no_number_is_a_crash(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "logits", lambda *_: torch.tensor([[float("nan")], [1.0]]))
    bad, fine = reward_model(options(directory))(ANSWERS[3:])
    assert {(bad.reward, bad.status), (fine.reward, fine.status)} == {(None, "crash"), (1.0, "ok")}


def test_one_of_several_labels_is_named(tiny_model: Path, tmp_path: Path) -> None:
    several = make_reward_model(tiny_model, tmp_path / "three", num_labels=3)
    first, by_name = (reward_model(options(several, label=label))(ANSWERS) for label in ("0", "LABEL_0"))
    assert first == by_name
    assert first != reward_model(options(several, label="LABEL_2"))(ANSWERS)
    for label in ("", "LABEL_9"):
        with pytest.raises(UsageError, match="none of the 3 labels") as caught:
            reward_model(options(several, label=label))
        assert "LABEL_0, LABEL_1, LABEL_2" in caught.value.hint


def test_a_language_model_is_no_reward_model(tiny_model: Path) -> None:
    """transformers would draw its head at random and only warn."""
    rate = reward_model(options(tiny_model, label="0"))
    with pytest.raises(UsageError, match=r"no weights for score\.weight"):
        rate(ANSWERS)


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own warnings are not ours to fix
def test_vllm_gives_the_same_raw_logits(directory: Path, tiny_model: Path) -> None:
    """Although it rates the last token, and this model pads with the token that ends every row."""
    scores = reward_model(options(directory, engine="vllm"))(ANSWERS)
    assert [s.reward for s in scores] == pytest.approx(oracle(directory, ANSWERS), abs=1e-3)
    with pytest.raises(UsageError, match="is LlamaForCausalLM"):
        reward_model(options(tiny_model, engine="vllm", label="0"))(ANSWERS)


def test_an_encoder_reads_its_own_frame_around_what_a_template_writes(tiny_model: Path, tmp_path: Path) -> None:
    """[CLS] and [SEP] come from the tokenizer's post-processor where the template leaves them out, and once."""
    place = tmp_path / "bert"
    shutil.copytree(tiny_model, place)
    torch.manual_seed(5)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_labels=1, pad_token_id=0, initializer_range=0.5,
        )
    ).save_pretrained(place)  # fmt: skip
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save(str(place / "tokenizer.json"))
    names = {"cls_token": "<|im_start|>", "sep_token": "<|im_end|>", "eos_token": "<|im_end|>"}
    (place / "tokenizer_config.json").write_text(json.dumps({**names, "tokenizer_class": "PreTrainedTokenizerFast"}))
    written: list[list[int]] = []
    for template in (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{{ cls_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ sep_token }}",
    ):
        (place / "chat_template.jinja").write_text(template)
        written.append(tokenise(load_chat(place), ANSWERS[0], 100))
    assert written[0] == written[1]
    assert (written[0][0], written[0][-1], written[0].count(1), written[0].count(2)) == (1, 2, 1, 1)
    assert "frame" in inputs(options(place))
    scores = reward_model(options(place, tokens_per_batch=100))(ANSWERS)
    assert [s.reward for s in scores] == pytest.approx(oracle(place, ANSWERS), abs=1e-4)


def test_without_a_model() -> None:
    for reads in (inputs, reward_model):
        with pytest.raises(UsageError, match="reward_model has no model"):
            reads(RewardModel())
    with pytest.raises(MissingInputError):
        reward_model(RewardModel(model="./nowhere"))


def test_the_identity_holds_weights_and_template_and_no_path(directory: Path, tmp_path: Path) -> None:
    def of(place: Path, **more: object) -> str:
        return identity("rm", {"rm": options(place, **more)})

    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    assert of(copy) == of(directory) == of(directory, tokens_per_batch=5)
    assert of(directory, max_length=5) != of(directory)
    (copy / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert of(copy) != of(directory)


def test_auto_is_the_number_type_of_the_machine(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    for dtype in ("bfloat16", "float32"):
        monkeypatch.setattr(machine, "number_type", lambda dtype=dtype: (dtype, ""))
        found[dtype] = identity("rm", {"rm": RewardModel(model=str(directory))})
        assert found[dtype] == identity("rm", {"rm": RewardModel(model=str(directory), dtype=dtype)})
    assert found["bfloat16"] != found["float32"]


def test_generate_with_a_reward_model(
    cli: Cli, tiny_model: Path, directory: Path, prompts_file: Path, tmp_path: Path
) -> None:
    tables = {"rm": {"kind": "reward_model", "model": str(directory), "dtype": "float32"}}
    done = cli(
        "generate", "--model", tiny_model, "--prompts", prompts_file, "--engine", "fake", "--num-samples", 2,
        "--rewards", "rm", "--reward-settings", json.dumps(tables), "--out", tmp_path / "g",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    means = json.loads((tmp_path / "g" / "manifest.json").read_text())["totals"]["mean_reward"]
    assert set(means) == {"rm"}
