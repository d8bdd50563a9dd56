"""`python -m prefpipe.forward.dequantize SOURCE.gguf DIRECTORY`: a quantised GGUF as a bf16 safetensors model."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def dequantize(source: Path, into: Path) -> None:
    """Write model, tokenizer and generation config of a GGUF file to a directory that transformers loads."""
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, trust_remote_code=False
    )
    # The weights are not quantised any more, but saving is refused as long as the model says that they are.
    del model.hf_quantizer
    delattr(model.config, "quantization_config")
    model.save_pretrained(into)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    tokenizer.save_pretrained(into)


if __name__ == "__main__":
    dequantize(Path(sys.argv[1]), Path(sys.argv[2]))
