"""What is no decoder of transformers is refused in one sentence, and no code of a model runs."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig, XLNetConfig

from prefpipe.errors import DataError, UsageError
from prefpipe.forward.architecture import check_architecture
from prefpipe.models.policy import resolve
from tests.conftest import ROOT, Call, Write
from tests.forward.cases import edited

OWN_CODE = {
    "model_type": "acme_lm",
    "auto_map": {"AutoConfig": "acme.AcmeConfig", "AutoModelForCausalLM": "acme.AcmeForCausalLM"},
}
MARK = "from pathlib import Path\nPath('RAN').write_text('')\n"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "acme_lm"}, "knows no architecture 'acme_lm'"),
        ({"model_type": None}, "knows no architecture 'None'"),
        ({"model_type": "t5"}, "is an encoder-decoder"),
        *(({"model_type": name}, "is an encoder") for name in ("bert", "bert-generation", "xlm", "cpmant")),
        ({"model_type": "llava"}, "images or sound with text"),
        ({"model_type": "vit"}, "not an architecture that transformers loads as a language model"),
        (OWN_CODE, "needs code of its own"),
    ],
)
def test_an_architecture_that_is_no_decoder_of_transformers(
    tiny_model: Path, tmp_path: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_architecture(edited(tiny_model, tmp_path / "m", **config))
    assert caught.value.hint.startswith(("take", "check"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "number of attention heads"),
        ({"quantization_config": {"quant_method": "acme"}}, "quantised in a way .* 'acme'"),
        ({"model_type": "xlnet"}, "no sequence length limit"),  # it takes no max_position_embeddings
        ({"quantization_config": "acme"}, "quantised in a way .* 'acme'"),
    ],
)
def test_a_config_that_describes_no_model(
    tiny_model: Path, tmp_path: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        check_architecture(edited(tiny_model, tmp_path / "m", **config))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_object(tiny_model: Path, tmp_path: Path, text: str) -> None:
    model = edited(tiny_model, tmp_path / "m")
    (model / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"config\.json"):
        check_architecture(model)


def test_an_adapter_inside_of_the_model_is_not_added_in_silence(tiny_model: Path, tmp_path: Path) -> None:
    model = edited(tiny_model, tmp_path / "m")
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="a model and an adapter"):
        check_architecture(model)


def test_code_beside_an_architecture_of_transformers_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    model = edited(tiny_model, tmp_path / "m", auto_map={"AutoModelForCausalLM": "acme.Acme"})
    assert check_architecture(model).model_type == "llama"
    assert resolve(str(model)).directory == model


def test_a_decoder_whose_config_says_that_it_is_none(tmp_path: Path) -> None:
    """GPT-NeoX: is_decoder is False there, and means nothing."""
    GPTNeoXConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert check_architecture(tmp_path).is_decoder is False


@pytest.mark.parametrize(("attention", "sees_ahead"), [("bi", True), ("uni", False)])
def test_what_looks_ahead_depends_on_the_config(tmp_path: Path, attention: str, sees_ahead: bool) -> None:
    XLNetConfig(n_layer=1, attn_type=attention).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is an encoder") if sees_ahead else contextlib.nullcontext():
        check_architecture(tmp_path)


def test_an_encoder_may_classify(tiny_model: Path, tmp_path: Path) -> None:
    model = edited(tiny_model, tmp_path / "m", model_type="bert")
    assert check_architecture(model, AutoModelForSequenceClassification).model_type == "bert"


def test_code_of_a_model_never_runs_and_nothing_is_asked(tiny_model: Path, tmp_path: Path, write: Write) -> None:
    model = edited(tiny_model, tmp_path / "m", **OWN_CODE)
    (model / "acme.py").write_text(MARK)
    rows = write({"prompt": "a", "chosen": "b", "rejected": "c"})
    done = subprocess.run(
        [sys.executable, "-m", "prefpipe", "score", "--model", str(model), "--inputs", str(rows), "--engine",
         "transformers", "--dtype", "float32", "--check", "0", "--out", str(tmp_path / "s")],
        input="y\ny\n", capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "needs code of its own" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("command", ["train", "generate"])
def test_every_command_refuses_an_encoder(
    call: Call, tiny_model: Path, tmp_path: Path, prompts_file: Path, write: Write, command: str
) -> None:
    model = edited(tiny_model, tmp_path / "m", model_type="bert")
    rows = write({"prompt": "a", "chosen": "b", "rejected": "c"})
    inputs = {
        "train": ("--pairs", rows),
        "generate": ("--prompts", prompts_file, "--engine", "transformers", "--reference", "none"),
    }[command]
    done = call(command, "--model", model, *inputs, "--dtype", "float32", "--out", tmp_path / "out")
    assert done.code == 2, done.stderr
    assert "is an encoder (bert)" in done.stderr
