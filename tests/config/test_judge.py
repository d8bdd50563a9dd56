"""Settings of a judge: what they refuse, and what follows from the engine."""

import pytest
from pydantic import ValidationError

from prefpipe.config.base import load
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.judge import Judge
from prefpipe.errors import UsageError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_url": "localhost"}, "must start with http"),
        ({"base_url": "http://user:key@host/v1"}, "neither a user nor a query"),
        ({"base_url": "http://host/v1?key=x"}, "neither a user nor a query"),
        ({"api_key": "sk-x"}, "Extra inputs are not permitted"),
        ({"api_key_env": "sk-not-a-name"}, "name of an environment variable"),
        ({"structured": "yaml"}, "'json_schema', 'json_object' or 'none'"),
    ],
)
def test_what_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Judge(**values)


def test_a_key_in_an_address_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        load(GenerateConfig, None, {"reward_settings": {"j": {"kind": "judge", "base_url": "https://me:sk-key@h/v1"}}})
    assert "reward_settings.j.base_url = 'https://***@h/v1'" in caught.value.message
    assert "sk-key" not in caught.value.message


def test_an_address_ends_without_a_slash() -> None:
    assert Judge(base_url="http://h/v1/").base_url == "http://h/v1"


def test_what_is_not_said_of_structured_follows_the_engine() -> None:
    found = {engine: Judge(engine=engine).structured for engine in ("endpoint", "vllm", "transformers", "fake")}
    assert found.pop("transformers") == "none"
    assert set(found.values()) == {"json_schema"}
    assert Judge(engine="vllm", structured="none").structured == "none"


@pytest.mark.parametrize("structured", ["json_schema", "json_object"])
def test_transformers_cannot_be_held_to_a_schema_and_the_error_says_what_can(structured: str) -> None:
    table = {"kind": "judge", "engine": "transformers", "model": "m", "structured": structured}
    with pytest.raises(UsageError, match=f'structured = "{structured}", but the transformers engine has no') as caught:
        load(GenerateConfig, None, {"reward_settings": {"j": table}})
    assert 'structured = "none"' in caught.value.message
    assert 'engine = "vllm"' in caught.value.message
