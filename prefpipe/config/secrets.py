"""Text that looks like a secret: no setting may contain it, and error messages show stars in its place."""

import re
from typing import Any

from pydantic import BaseModel

# Keys of providers begin with these; a digit tells them from names of models and organisations.
_KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|pk|rk|gsk|csk|xai|pplx|nvapi|r8|glpat)[-_](?=[\w-]*[0-9])[\w-]{16,}"
    r"|(?:hf|gh[opsu])_[A-Za-z0-9]{20,}|AIza[\w-]{30,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
    r"|\bBearer\s+\S{8,}",
    re.ASCII,
)
_NAMED = re.compile(
    r"((?:api[_-]?key|authorization|token|secret|password)\b[\"']?\s*[:=]\s*[\"']?)[^\"'\s,}]+", re.IGNORECASE
)
_USER = re.compile(r"://[^/@\s]*@")
_QUERY = re.compile(r"(://[^?#\s]*)[?#].*", re.DOTALL)


def setting_with_key(settings: BaseModel) -> str | None:
    """The name of the first setting whose text, or a text in its list, looks like an API key."""
    for name, value in settings:
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and holds_key(text) for text in texts):
            return name
    return None


def holds_key(text: str) -> bool:
    """Whether a text holds what looks like a key of an API."""
    return _KEY.search(text) is not None


def masked(value: Any) -> Any:
    """A value for the terminal: keys become stars, and so do user, query and fragment of an address."""
    if isinstance(value, list | tuple):
        return [masked(part) for part in value]
    if not isinstance(value, str):
        return value
    text = _QUERY.sub(r"\1?***", _USER.sub("://***@", value))
    return _NAMED.sub(r"\1***", _KEY.sub("***", text))
