"""Packages that stand in for real ones: a folder of modules, and metadata that pip would have written."""

from collections.abc import Mapping
from pathlib import Path

# transformers as far as the doctor imports it, with a part that is read if it is there.
LIBRARY = {
    "transformers/__init__.py": "try:\n    import wavelets\nexcept ImportError:\n    pass\nAutoModelForCausalLM = 1\n",
    "transformers/models/llama/modeling_llama.py": "",
}
WHOLE = {
    "transformers/__init__.py": "AutoModelForCausalLM = 1\n",
    "transformers/models/llama/modeling_llama.py": "",
    "peft.py": "",
    "vllm.py": "LLM = SamplingParams = 1\n",
    "torch.py": "raise ModuleNotFoundError(\"No module named 'torch'\")\n",
}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """Write modules into a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def install(folder: Path, name: str, version: str, *requires: str, python: str = ">=3.11") -> Path:
    """Write the metadata of a distribution into a folder."""
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    text = "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n"
    return write(folder, {f"{name.replace('-', '_')}-{version}.dist-info/METADATA": text})
