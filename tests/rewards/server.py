"""An OpenAI-compatible endpoint on localhost for tests: real sockets, answers from a function."""

import json
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.serving import on_localhost


@dataclass
class Endpoint:
    """Where it listens, and what was asked of it."""

    base_url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    busiest: int = 0


def completion(text: str | None, finish_reason: str = "stop") -> tuple[int, dict[str, Any]]:
    message = {"role": "assistant", "content": text}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


@contextmanager
def serving(answer: Callable[[dict[str, Any]], tuple[int, Any] | None]) -> Generator[Endpoint]:
    """`answer(request)` gives a status and a JSON value (or bytes, or (value, headers)); None closes the connection
    without a word. The request is the JSON that was sent, with its path and method."""
    lock, under_way = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def respond(self, request: dict[str, Any]) -> None:
            request |= {"path": self.path, "method": self.command}
            with lock:
                endpoint.requests.append(request)
                endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                under_way[0] += 1
                endpoint.busiest = max(endpoint.busiest, under_way[0])
            try:
                answered = answer(request)
            finally:
                with lock:
                    under_way[0] -= 1
            if answered is None:
                self.close_connection = True
                return
            status, value = answered
            value, headers = value if isinstance(value, tuple) else (value, {})
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, text)
            with suppress(OSError):  # nobody waits any more
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with on_localhost(Handler) as address:
        endpoint = Endpoint(f"{address}/v1")
        yield endpoint


@contextmanager
def raw(answer: Callable[[socket.socket, threading.Event], None]) -> Generator[str]:
    """A server that speaks no HTTP by itself: `answer(connection, stop)` is called for each connection, in a thread.
    Yields HOST:PORT. `stop` is set at the end, and connections that break are no errors."""
    stop, threads = threading.Event(), list[threading.Thread]()

    def handle(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            answer(connection, stop)

    def accept() -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                threads.append(threading.Thread(target=handle, args=(listener.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            for thread in (accepting, *threads):
                thread.join()
