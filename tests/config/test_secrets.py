"""No setting takes what looks like a key, and no error about a setting shows one."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config import base, secrets
from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import UsageError

KEYS = [
    "sk-proj-0123456789abcdefghij", "sk-ant-api03-AbCd_EfGh-0123456789", "gsk_0123456789abcdefghijklmnop",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "AIza0123456789abcdefghijklmnopqrstuvwxy", "AKIA0123456789ABCDEF",
    "ghp_0123456789abcdefghijklmnopqrstuvwxyz", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdef-_123",
    "Bearer 0123456789abcdef", "xai-0123456789abcdefghijklmnop",
]  # fmt: skip
NAMES = [
    "hf-internal-testing/tiny-random-LlamaForCausalLM", "skt/A.X-4.0-Light", "sk-telecom/some-model", "gpt-5.2",
    "Qwen/Qwen3-30B-A3B-Instruct-2507", "http://localhost:8000/v1",
    "https://api.example/v1/accounts/0123456789abcdef01234567",
    r"sk-[A-Za-z0-9]{20,}", "Does the answer hold a key such as sk-...?",
    "/models/hf_checkpoints/step_0000000000012345",
]  # fmt: skip


def refusal(settings: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        base.load(GenerateConfig, None, settings)
    return caught.value.message + caught.value.hint


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "table",
    [
        {"kind": "judge", "model": "KEY"}, {"kind": "judge", "model": "org/KEY"},
        {"kind": "judge", "criteria": "Use KEY."},
        {"kind": "judge", "base_url": "https://h.example/KEY/v1"},
        {"kind": "judge", "base_url": "https://KEY@h.example/v1"},
        {"kind": "judge", "base_url": "https://h.example/v1?key=KEY"},
        {"kind": "judge", "base_url": "h.example/v1?key=KEY"},
        {"kind": "judge", "base_url": "https://h.example:KEY/v1"}, {"kind": "judge", "api_key_env": "KEY"},
        {"kind": "judge", "api_key": "KEY"}, {"kind": "judge", "headers": {"Authorization": "KEY"}},
        {"kind": "judge", "timeout_seconds": "KEY"}, {"kind": "judge", "mode": "KEY"}, {"kind": "KEY"},
        {"kind": ["KEY"]},
        {"kind": "refusal", "phrases": ["KEY"]}, {"kind": "regex", "pattern": "KEY"}, {"kind": "keyword", "all": "KEY"},
        {"kind": "function", "function": "m:KEY"}, {"kind": "reward_model", "model": "KEY"}, "KEY",
    ],
)  # fmt: skip
def test_a_key_in_a_setting_is_refused_and_not_shown(key: str, table: Any) -> None:
    table = json.loads(json.dumps(table).replace("KEY", key))
    assert key not in refusal({"reward_settings": {"j": table}})
    assert key not in refusal({"reward_settings": json.dumps({"j": table})})


@pytest.mark.parametrize(
    "text", ['{"j": {"kind": "judge", "api_key": "KEY"', '{"j": {"Authorization": KEY}}', "api_key=KEY"]
)
@pytest.mark.parametrize("key", [*KEYS, "any-word-that-is-one"])
def test_a_table_that_is_no_json_does_not_show_its_keys(text: str, key: str) -> None:
    assert key.removeprefix("Bearer ") not in refusal({"reward_settings": text.replace("KEY", key)})


@pytest.mark.parametrize("text", NAMES)
def test_names_addresses_and_patterns_are_no_keys(text: str) -> None:
    assert secrets.masked(text) == text
    table = {"kind": "judge", "model": text, "criteria": text}
    assert base.load(GenerateConfig, None, {"reward_settings": {"j": table}}).reward_settings["j"].model == text


def test_a_recipe_with_a_key_is_refused_and_not_shown(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[reward_settings.j]\nkind = "judge"\nmodel = "{KEYS[0]}"\n')
    with pytest.raises(UsageError, match="holds what looks like a key") as caught:
        base.load(GenerateConfig, recipe, {})
    assert "reward_settings: table 'j': model" in caught.value.message
    assert KEYS[0] not in caught.value.message


def test_what_is_masked() -> None:
    assert secrets.masked("https://me:pass@h/v1?q=1#f") == "https://***@h/v1?***"
    assert secrets.masked(["a", f"b {KEYS[0]}", 3]) == ["a", "b ***", 3]
    assert secrets.masked(3) == 3
