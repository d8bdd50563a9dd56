"""The key of an endpoint, from the environment: a value that nothing prints, saves or logs, and that stays here."""

import json
import os
from typing import NoReturn
from urllib.parse import quote

from pydantic import SecretStr

from prefpipe.errors import UsageError

_SHORTEST = 4  # of a key that is cut out of texts: a shorter one is a placeholder, and stands in any word


class ApiKey(SecretStr):
    """The text of a key. str, repr, format, JSON and settings show stars, and it has no pickle."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a key is not copied and leaves no process")

    def cut_out_of(self, text: str) -> str:
        """A text of others without the key, which they may repeat as it is, in JSON or in an address."""
        key = self.get_secret_value()
        if len(key) < _SHORTEST:
            return text
        for spelling in {key, json.dumps(key)[1:-1], quote(key), quote(key, safe="")}:
            text = text.replace(spelling, "***")
        return text


def read(variable: str) -> ApiKey:
    """The key in an environment variable, without white space around it; empty where the variable is not set.

    Raises UsageError for what no header takes.
    """
    key = ApiKey(os.environ.get(variable, "").strip())
    if not (key.get_secret_value().isascii() and key.get_secret_value().isprintable()):
        raise UsageError(f"the key in {variable} has characters that no key has", "set it again, without line breaks")
    return key
