"""Cards of repositories: the card of a dataset, the base model that a card names, and text that no card may contain."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefpipe import __version__
from prefpipe.config import secrets
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import UsageError
from prefpipe.schemas import VERSION

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_BASE = re.compile(r"^base_model: (.*)$", re.MULTILINE)
# A place on a machine: /data/models/mine, ~/models. A lone /name may be a word of a template.
_PLACE = re.compile(r"(?<![\w.:/<~-])(?:~?/[\w.+@-](?:[\w.+@ -]*[\w.+@-])?/[\w./+@-]*|~/[\w.+@-]+)|file://\S*")


def base_of(card: str) -> str:
    """The base model that a card of prefpipe names; empty where the card names none."""
    found = _BASE.search(card)
    return found[1].strip() if found else ""


def is_local(base: str) -> bool:
    """Whether the name of a base model is a path on this machine and not a name of the hub."""
    return Path(base).exists() or HUB_NAME.fullmatch(base) is None


def with_base(text: str, old: str, new: str) -> str:
    """The text of a card or of an adapter's config, with `new` in place of the base model `old`."""
    text = text.replace(f"base_model: {old}\n", f"base_model: {new}\n")
    return text.replace(json.dumps(old), json.dumps(new)).replace(f'"{old}"', f'"{new}"')


def check_open(name: str, text: str) -> None:
    """Raise UsageError where a text that goes to a repository contains a key, or a path of this machine."""
    if secrets.holds_key(text):
        raise UsageError(f"{name} holds what looks like a key of an API", "make the run again without it in a setting")
    home = str(Path.home())
    place = home if len(home) > 1 and home in text else next((m[0] for m in _PLACE.finditer(text)), None)
    if place is not None:
        raise UsageError(
            f"{name} shows a place on this machine: {place}",
            "make the run again with names that all may see; --base-model OWNER/NAME renames the base of an adapter",
        )


def dataset_card(config: BuildPairsConfig, manifest: Mapping[str, Any], folders: list[str]) -> str:
    """The README.md of a dataset that `build-pairs` made: one subset for each folder of Parquet files. It contains no
    time and no path, so that the same run has the same card."""
    subsets = "\n".join(f"- config_name: {folder}\n  data_files: {folder}/*.parquet" for folder in folders)
    totals, identity = manifest["totals"], manifest["identity"]
    rule = config.rule if config.output == "pairs" else config.label_rule if config.output == "labels" else "ranking"
    policies = "\n".join(f"- `{policy}`" for policy in identity["policies"])
    levels = "\n".join(
        f"| {name} | {level['in']} | {level['out']} | "
        f"{', '.join(f'{reason} {count}' for reason, count in level['dropped'].items()) or 'none'} |"
        for name, level in totals["levels"].items()
    )
    checks = "\n".join(f"| {c['id']} {c['name']} | {c['level']} | {c['found']} |" for c in totals["data_report"])
    return f"""---
tags: [prefpipe, preference-optimization]
configs:
{subsets}
---

# Preference data made with prefpipe {__version__}

{totals[config.output]} {config.output} from {totals["completions"]} completions of {totals["prompts"]} prompts.

- reward: `{config.reward}`; rule: {rule}
- schema version {VERSION} of prefpipe; `*_token_ids` and log-probs belong to the tokenizer and reference of the columns

## Policies that wrote the completions

{policies}

## Rows

| level | in | out | dropped |
|---|---|---|---|
{levels}

## Checks of the data

| check | level | finding |
|---|---|---|
{checks}

## Load it

```python
from datasets import load_dataset

rows = load_dataset("OWNER/NAME", "{folders[0]}", split="train")
```
"""
