"""What a model directory must say of itself before its weights are read: an architecture of transformers, no code."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from prefpipe.errors import DataError, UsageError

_ODD_CONFIG = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, OSError, ImportError),
    *(RuntimeError, StrictDataclassError),
)


def check_architecture(directory: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedConfig:
    """The config of a model that `kind` (a class of transformers such as AutoModelForCausalLM) loads with its own code.

    Raises UsageError for an architecture that transformers does not know or that is of another kind, and for a model
    that needs code of its own; DataError for a config that cannot be read and an unknown quantisation. Runs no code of
    the model and asks nothing.
    """
    try:
        raw: Any = PreTrainedConfig.get_config_dict(directory, local_files_only=True)[0]
        if not isinstance(raw, dict):
            raise TypeError(f"a JSON {type(raw).__name__} in place of an object")
    except _ODD_CONFIG as error:
        raise _no_model(directory, error) from error
    check_own_code(directory, raw)
    _check_quantisation(directory, raw)
    if (directory / "adapter_config.json").exists():
        raise UsageError(
            f"{directory} holds a model and an adapter, which transformers would add in silence",
            "keep the adapter in a directory of its own and pass it with --adapter",
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except _ODD_CONFIG as error:
        raise _no_model(directory, error) from error
    _check_kind(directory, config, kind)
    return config


def _no_model(directory: Path, error: Exception) -> DataError:
    return DataError(
        f"{directory / 'config.json'} does not describe a model: {reason(error)}", "fetch or save the model again"
    )


def check_own_code(directory: Path, config: dict[str, Any]) -> None:
    """Raise UsageError where transformers has no code for a model: that of its directory never runs."""
    name = config.get("model_type")
    if isinstance(name, str) and name in CONFIG_MAPPING:
        return
    if config.get("auto_map"):
        raise UsageError(
            f"{directory} needs code of its own (auto_map in config.json; transformers has no '{name}'), and prefpipe "
            "never runs code of a model",
            "take a model of an architecture that transformers has, or a version of this one converted to such",
        )
    raise UsageError(
        f"{directory}: transformers knows no architecture '{name}' (model_type in config.json)",
        "check that the directory holds a model, or install a newer transformers",
    )


def reason(error: BaseException) -> str:
    """What an exception of a library says, in one line: the first two of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'no reason given'}"


def _check_kind(directory: Path, config: PreTrainedConfig, kind: Any) -> None:
    name = config.model_type
    if config.is_encoder_decoder:
        raise UsageError(
            f"{directory} is an encoder-decoder ({name}): its answers do not continue its prompts",
            "take a decoder-only model",
        )
    if type(config) not in kind._model_mapping:
        if "text_config" in config.sub_configs or "vision_config" in config.sub_configs:
            raise UsageError(
                f"{directory} is a model of images or sound with text ({name}), and transformers has no text-only "
                "class for it",
                "take the language model that it is made of",
            )
        wanted = "language model" if kind is AutoModelForCausalLM else "sequence classifier"
        raise UsageError(
            f"{directory} ({name}) is not an architecture that transformers loads as a {wanted}",
            f"take a {wanted}",
        )
    if kind is AutoModelForCausalLM and _looks_ahead(config):
        raise UsageError(
            f"{directory} is an encoder ({name}): its tokens see those that follow them", "take a decoder-only model"
        )


def _looks_ahead(config: PreTrainedConfig) -> bool:
    """Whether a token sees those that follow it, by the names that configs have for it: a log-prob of a token would
    know the token."""
    masked = AutoModelForMaskedLM._model_mapping  # pyright: ignore[reportPrivateUsage]  (no public name)
    is_encoder = type(config) in masked or config.model_type == "bert-generation"
    return (
        (is_encoder and not getattr(config, "is_decoder", True))
        or getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all")
        or getattr(config, "causal", True) is False  # XLM
        or getattr(config, "attn_type", None) == "bi"  # XLNet
        or config.model_type == "cpmant"
    )


def _check_quantisation(directory: Path, config: dict[str, Any]) -> None:
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if isinstance(settings, dict):
        for bits in ("4bit", "8bit"):
            method = f"bitsandbytes_{bits}" if settings.get(f"load_in_{bits}") else method
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise DataError(
            f"{directory} is quantised in a way that transformers does not know: {method!r} (quantization_config in "
            "config.json)",
            "take the model in 16 bits",
        )
