"""Requests over HTTP to services that the user names, for the judge and for engines behind a URL: JSON in, text out.

A request has one deadline, from the look-up of the address to the last byte of the answer, and an answer has a largest
size. What a service answers, or that it does not, is a value and never an exception. The key comes from the environment
and is cut out of every text that leaves this module.
"""

import asyncio
import json
import os
import re
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from prefpipe.api_key import ApiKey
from prefpipe.errors import UsageError

MOST_BYTES = 16 << 20  # of an answer, unpacked
SHOWN = 300  # characters of an answer in a message
_TRANSIENT = (408, 409, 429, 500, 502, 503, 504)  # the same request may succeed later
_LONGEST_PAUSE = 60.0
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")  # in small or capital letters
_CERTIFICATES = ("ssl_cert_file", "ssl_cert_dir")


@dataclass(frozen=True)
class Answer:
    """What came back: a status with its text, or why nothing did (status 0, with the reason). The key is cut out."""

    status: int
    text: str
    retry_after: str | None = None
    failure: Literal["", "late", "broken", "unreachable"] = ""

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        return bool(self.failure) or self.status in _TRANSIENT

    @property
    def shown(self) -> str:
        """The start of the text, for a message."""
        return self.text[:SHOWN]


@dataclass(frozen=True)
class Link:
    """What the requests to a service share. `setting` is the name of the setting with its address, for messages."""

    client: httpx.AsyncClient
    key: ApiKey
    timeout_seconds: float
    setting: str


class _Bearer(httpx.Auth):
    """Writes the key into the header of a request, and nowhere else."""

    def __init__(self, key: ApiKey) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        yield request


def link(addresses: Sequence[str], setting: str, key: ApiKey, timeout_seconds: float, connections: int) -> Link:
    """A client with so many connections. It follows no redirect, and its only time limit is that of a request.

    Raises UsageError for an address, a proxy or certificates that cannot be used.
    """
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    for address in addresses:
        try:
            httpx.URL(address)
        except httpx.InvalidURL as error:
            raise _no_address(setting, address, error) from None
    try:
        client = httpx.AsyncClient(timeout=None, limits=limits, auth=_Bearer(key) if key else None)
    except OSError:
        raise UsageError(f"the certificates that {_set(_CERTIFICATES)} names cannot be read", "mend it") from None
    except (ValueError, ImportError, httpx.InvalidURL):
        raise UsageError(
            f"the address of the proxy in {_set(_PROXIES)} cannot be used",
            "write it as http://HOST:PORT (socks5:// needs the package socksio); NO_PROXY takes names of hosts",
        ) from None
    return Link(client, key, timeout_seconds, setting)


async def ask(link: Link, url: str, value: object = None, *, most_bytes: int = MOST_BYTES) -> Answer:
    """The whole answer, unpacked, or why there is none: to a POST of `value` as JSON, to a GET without one."""
    is_connected = False

    async def follow(event: str, _details: object) -> None:
        nonlocal is_connected
        is_connected = is_connected or event.endswith("send_request_headers.started")

    try:
        async with asyncio.timeout(link.timeout_seconds):
            return await _receive(link, url, value, follow, most_bytes)
    except TimeoutError:
        if is_connected:
            return Answer(0, "no answer in time", failure="late")
        return Answer(0, f"no connection within {link.timeout_seconds:g} s", failure="unreachable")
    except httpx.TransportError as error:
        is_reached = is_connected and not isinstance(error, httpx.ProxyError)
        said = link.key.cut_out_of(str(error)) or type(error).__name__
        return Answer(0, said, failure="broken" if is_reached else "unreachable")
    except httpx.DecodingError as error:
        return Answer(502, f"an answer that cannot be unpacked: {error}")
    except (httpx.InvalidURL, UnicodeError) as error:  # UnicodeError: parts of a host that are empty or too long
        raise _no_address(link.setting, url, error) from None


async def _receive(
    link: Link, url: str, value: object, follow: Callable[[str, object], Any], most_bytes: int
) -> Answer:
    """What the service answers; `follow` is called with the name of each step on the way."""
    sent: dict[str, Any] = {}
    if value is not None:
        sent = {"content": json.dumps(value).encode(), "headers": {"content-type": "application/json"}}
    method = "GET" if value is None else "POST"
    async with link.client.stream(method, url, extensions={"trace": follow}, **sent) as answer:
        content = bytearray()
        async for chunk in answer.aiter_bytes():
            content += chunk
            if len(content) > most_bytes:
                return Answer(502, f"an answer of more than {most_bytes:,} bytes")
        said = link.key.cut_out_of(content.decode(errors="replace"))
        return Answer(answer.status_code, said, answer.headers.get("retry-after"))


def pause(backoff_seconds: float, attempt: int, retry_after: str | None) -> float:
    """Seconds before retry `attempt` (0 is the first): doubling, at least what Retry-After says, at most a minute."""
    wanted = float(retry_after) if retry_after and _SECONDS.fullmatch(retry_after) else 0.0
    return min(max(backoff_seconds * 2**attempt, wanted), _LONGEST_PAUSE)


def proxy_hint() -> str:
    """The end of a hint about a service that cannot be reached: the variables of a proxy, where some are set."""
    return f", and NO_PROXY if {_set(_PROXIES)} is not meant for it" * bool(_set(_PROXIES))


@contextmanager
def loop_in_thread() -> Generator[asyncio.AbstractEventLoop]:
    """An event loop that runs in another thread until the block ends; what still runs in it then is cancelled.

    In another thread, since what the handler of a signal raises inside of a loop, asyncio may keep to itself.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="http", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_end(loop), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(loop: asyncio.AbstractEventLoop) -> None:
    others = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


def _set(variables: Sequence[str]) -> str:
    """Those of some environment variables that are set, as a list for a sentence."""
    return ", ".join(name for name in os.environ if name.lower() in variables)


def _no_address(setting: str, address: str, error: Exception) -> UsageError:
    return UsageError(f"{setting} = '{address}' is no address: {error}", f"mend {setting}")
