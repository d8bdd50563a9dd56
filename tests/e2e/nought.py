"""A reward that thinks nothing of anything."""

from typing import Any


def nought(completions: list[Any], **_columns: Any) -> list[float]:
    """Zero for every completion."""
    return [0.0] * len(completions)
