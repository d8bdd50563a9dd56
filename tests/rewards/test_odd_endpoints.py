"""Endpoints, addresses, proxies and answers that are odd: the status of a row, or one error that names the setting."""

import gc
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config import base
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.judge import Judge
from prefpipe.errors import Interrupted, StorageError, UsageError
from prefpipe.rewards.endpoint import Question, Reply, ask_all
from tests.rewards.server import completion, raw, serving
from tests.serving import nobody
from tests.waiting import interruption

QUESTION = [Question([{"role": "user", "content": "?"}], {})]
FINE = json.dumps(completion("fine")[1]).encode()
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(FINE)
PASSWORD = "sk-password-0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def ask(base_url: str, questions: list[Question] = QUESTION, **more: Any) -> Reply:
    table = {"base_url": base_url, "retries": 0, "backoff_seconds": 0, "timeout_seconds": 60, "structured": "none"}
    (reply,) = ask_all(Judge(**{**table, **more}), questions)
    return reply


def drip(connection: socket.socket, stop: threading.Event, content: bytes) -> None:
    """A byte at a time: every read is quick, the whole is not."""
    for byte in content:
        connection.sendall(bytes([byte]))
        if stop.wait(0.1):
            return


@pytest.mark.parametrize(
    "sent",
    [
        (b"", HEAD + b"\r\n" + FINE),  # the status line and the headers
        (b"HTTP/1.1 200 OK\r\n", b"x-long: " + b"y" * 1000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        (HEAD + b"\r\n", FINE),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 100),
        (b"HTTP/1.1 302 Found\r\n", b"location: http://127.0.0.1:1/" + b"x" * 1000),
        (b"", b""),  # nothing at all
    ],
)
def test_the_time_limit_holds_for_the_whole_request(sent: tuple[bytes, bytes]) -> None:
    def answer(connection: socket.socket, stop: threading.Event) -> None:
        connection.recv(1 << 16)
        connection.sendall(sent[0])
        drip(connection, stop, sent[1])
        stop.wait()

    with raw(answer) as place:
        reply = ask(f"http://{place}/v1", timeout_seconds=1)
    assert reply == Reply(None, "timeout", "no answer within 1 s, asked 1 times")


def test_an_endpoint_that_does_not_read_the_question_is_late() -> None:
    with raw(lambda _connection, stop: stop.wait() and None) as place:
        long = [Question([{"role": "user", "content": "x" * (8 << 20)}], {})]
        assert ask(f"http://{place}/v1", long, timeout_seconds=2).status == "timeout"


@pytest.mark.filterwarnings("ignore:Exception ignored in.*:pytest.PytestUnraisableExceptionWarning")
def test_a_handshake_that_does_not_end_is_an_endpoint_that_cannot_be_reached() -> None:
    """httpcore leaves the socket of a handshake that is cancelled to the garbage collector, which warns."""
    with raw(lambda _connection, stop: stop.wait() and None) as place, pytest.raises(StorageError) as caught:
        ask(f"https://{place}/v1", timeout_seconds=0.4)
    assert "cannot be reached: no connection within 0.4 s" in caught.value.message
    assert "base_url" in caught.value.hint
    del caught
    gc.collect()


def test_a_slow_look_up_of_the_address_is_under_the_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: time.sleep(0.8) or [])
    with pytest.raises(StorageError, match=r"no connection within 0\.2 s"):
        ask("http://judge.example/v1", timeout_seconds=0.2)


def test_a_signal_does_not_wait_for_the_endpoint() -> None:
    with interruption(Interrupted(15)) as interrupt:

        def answer(_connection: socket.socket, stop: threading.Event) -> None:
            interrupt()
            stop.wait()

        with raw(answer) as place, pytest.raises(Interrupted):
            ask(f"http://{place}/v1", timeout_seconds=600)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"", "the answer breaks off"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "the answer breaks off"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort", "the answer breaks off"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", "the answer breaks off"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000, "the answer breaks off"),
        (b"HTTP/1.1 99999 ?\r\n\r\n", "the answer breaks off"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=undefined\r\ncontent-length: 2\r\n\r\n\xff{",
            "no chat",
        ),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "204"),
        (b"HTTP/1.1 302 Found\r\nlocation: file:///etc/passwd\r\ncontent-length: 0\r\n\r\n", "302"),
    ],
)
def test_an_answer_that_is_no_answer_costs_its_row(sent: bytes, words: str) -> None:
    def answer(connection: socket.socket, _stop: threading.Event) -> None:
        connection.recv(1 << 16)
        connection.sendall(sent)

    with raw(answer) as place:
        reply = ask(f"http://{place}/v1")
    assert reply.status == "crash"
    assert words in (reply.detail or "")
    assert len(reply.detail or "") < 500


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"x" * (17 << 20), {}),
        (b"no gzip", {"content-encoding": "gzip"}),
        (gzip.compress(FINE)[:-12], {"content-encoding": "gzip"}),
        (FINE, {"content-encoding": "deflate, gzip"}),
        (b"[" * 100_000, {}),
        (b'{"choices":' * 50_000, {}),
        (b'{"choices": [{"message": {"content": 1%s}}]}' % (b"0" * 5000), {}),
        (b"\xff\xfe{\x00}\x00", {}),
        (b'{"choices": NaN}', {}),
        (b"null", {}),
    ],
)
def test_answers_that_no_reader_should_take_are_crashes(content: bytes, headers: dict[str, str]) -> None:
    with serving(lambda _request: (200, (content, {"content-length": str(len(content)), **headers}))) as endpoint:
        reply = ask(endpoint.base_url)
    assert (reply.text, reply.status) == (None, "crash")
    assert len(reply.detail or "") < 500


def test_a_small_answer_that_unpacks_to_300_mib_is_a_crash() -> None:
    content = gzip.compress(bytes(300 << 20), 1)
    headers = {"content-length": str(len(content)), "content-encoding": "gzip"}
    with serving(lambda _request: (200, (content, headers))) as endpoint:
        assert ask(endpoint.base_url).status == "crash"


@pytest.mark.parametrize("text", ["fine \ud800", "\udcff fine", "a\ud83d b"])
def test_half_a_character_in_an_answer_is_replaced(text: str) -> None:
    with serving(lambda _request: completion(text)) as endpoint:
        assert ask(endpoint.base_url).text == text.encode(errors="replace").decode()


@pytest.mark.parametrize("text", [7, ["a"], {"a": 1}, True])
def test_content_that_is_no_text_is_unparsable(text: Any) -> None:
    with serving(lambda _request: completion(text)) as endpoint:
        assert ask(endpoint.base_url).status == "unparsable"


@pytest.mark.parametrize(
    "url",
    [
        "", "localhost:8000/v1", "//localhost/v1", "file:///etc/passwd", "ftp://h/v1", "http:/h/v1", "http://", "http:///v1",
        "http://h:0/v1", "http://h:99999/v1", "http://h:-1/v1", "http://h:port/v1", "http://[::1/v1", "http://::1/v1",
        "http://h ost/v1", "http://h\n/v1", "http://h\x00/v1", "http://h/v1\ud800", "http://h\\v1", "http://h/v1?a", "http://u@h/v1",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_before_the_run(url: str) -> None:
    with pytest.raises(UsageError, match="base_url"):
        base.load(GenerateConfig, None, {"reward_settings": {"j": {"kind": "judge", "base_url": url}}})


@pytest.mark.parametrize(
    "url", ["http://a..b/v1", f"http://{'a' * 64}.example/v1", "http://xn--/v1", "http://\u2028/v1"]
)
def test_a_host_that_no_name_server_knows_is_one_error(url: str) -> None:
    with pytest.raises((UsageError, StorageError)) as caught:
        ask_all(Judge.model_construct(**{**Judge().model_dump(), "base_url": url, "retries": 0}), QUESTION)
    assert "base_url" in caught.value.message + caught.value.hint


def test_addresses_that_are_fine() -> None:
    with serving(lambda _request: completion("fine")) as endpoint:
        port = endpoint.base_url.rpartition(":")[2].partition("/")[0]
        for url in (f"http://127.0.0.1:{port}/v1///", f"http://localhost:{port}/v1"):
            assert ask(url).text == "fine"
    assert {request["path"] for request in endpoint.requests} == {"/v1/chat/completions"}


def test_an_address_of_version_6() -> None:
    assert Judge(base_url="http://[::1]:8000/v1/").base_url == "http://[::1]:8000/v1"
    with nobody("::1") as port, pytest.raises(StorageError, match="cannot be reached"):
        ask(f"http://[::1]:{port}/v1")


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    "value",
    [
        "ftp://h:1", "socks4://h:1", "http://[::1", "http://h:99999", "http://h:port", "http://", "://", "http://\x7f",
        f"http://me:{PASSWORD}@h:99999", f"nothing://me:{PASSWORD}@h", "127.0.0.1:1", "http://127.0.0.1:1",
        f"http://me:{PASSWORD}@127.0.0.1:1", "http://a..b", "é",
    ],
)  # fmt: skip
def test_a_proxy_that_is_none_or_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """And what it holds is not shown."""
    monkeypatch.setenv(name, value)
    with serving(lambda _request: completion("fine")) as endpoint:
        with pytest.raises((UsageError, StorageError)) as caught:
            ask(endpoint.base_url)
        said = caught.value.message + caught.value.hint
        assert name in said
        assert PASSWORD not in said
        monkeypatch.setenv("NO_PROXY", "*")
        assert ask(endpoint.base_url).text == "fine"


@pytest.mark.parametrize("value", ["127.0.0.1", "*", ",,127.0.0.1,", "::1, 127.0.0.1", "10.0.0.0/8,127.0.0.1"])
def test_hosts_without_a_proxy(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", value)
    with serving(lambda _request: completion("fine")) as endpoint:
        assert ask(endpoint.base_url).text == "fine"


@pytest.mark.parametrize("value", ["[::1", "é", "a b\x7f"])
def test_an_odd_list_of_hosts_without_a_proxy_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NO_PROXY", value)
    with serving(lambda _request: completion("fine")) as endpoint, pytest.raises(UsageError, match="NO_PROXY"):
        ask(endpoint.base_url)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").write_text("no certificate")
    monkeypatch.setenv(name, str(tmp_path / ("empty" if name == "SSL_CERT_FILE" else "missing")))
    with pytest.raises((UsageError, StorageError), match=r"SSL_CERT|cannot be reached"):
        ask("https://127.0.0.1:1/v1")


@pytest.fixture
def silent() -> Iterator[str]:
    with raw(lambda _connection, stop: stop.wait() and None) as place:
        yield place


def test_a_proxy_that_says_nothing_is_under_the_time_limit(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{silent}")
    assert ask("http://judge.example/v1", timeout_seconds=1).status == "timeout"
