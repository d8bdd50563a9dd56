"""A model small enough for every test: two random Llama layers over bytes, with a chat template, and adapters for it.
Made in a second."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefpipe.forward.load import adapter_tensors, add_lora, load_model, save_adapter
from prefpipe.models import policy as model_files

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(directory: Path, seed: int = 0, spread: float = 0.3, hidden_size: int = 64) -> Path:
    """Write a random model; another seed gives other weights. `spread` is the standard deviation of the weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return with_tokenizer(LlamaForCausalLM(config), directory)


def make_gpt2(directory: Path, context: int) -> Path:
    """Write a random model with learned positions: beyond `context` tokens it has none."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=264,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=context,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return with_tokenizer(GPT2LMHeadModel(config), directory)


def with_tokenizer(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model with the tokenizer over bytes and its chat template."""
    directory.mkdir(parents=True)
    write_tokenizer(directory)
    model.save_pretrained(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write the tokenizer over bytes and its chat template."""
    _tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def make_adapter(model: Path, directory: Path, seed: int) -> Path:
    """Write a LoRA adapter that moves the model; another seed moves it elsewhere."""
    lora = add_lora(load_model(model, "float32"), r=2, alpha=2, target_modules="q_proj,v_proj", seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    directory.mkdir(parents=True)
    save_adapter(lora, adapter_tensors(lora), directory, "tiny")
    (directory / "prefpipe.json").write_text(model_files.adapter_base_record(model_files.resolve(str(model)).weights))
    return directory


def _tokenizer() -> Tokenizer:
    """One token per byte, after the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
