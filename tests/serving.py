"""A server of a test on localhost, and an address without one."""

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # beyond five the kernel drops connections, which come again after a second


@contextmanager
def on_localhost(handler: type[BaseHTTPRequestHandler]) -> Generator[str]:
    """Serve until the block ends; its address, http://HOST:PORT."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def nobody(host: str = "127.0.0.1") -> Generator[int]:
    """A port where nobody listens, which no other process can have meanwhile."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, 0))
        yield taken.getsockname()[1]
