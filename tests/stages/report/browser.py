"""One headless Chromium for all tests of pages, driven through a pipe by the browser's own protocol (CDP). What a page
logs, asks for and becomes; what axe-core, an accessibility checker, finds in it."""

import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
_AXE = importlib.util.find_spec("axe_playwright_python")  # a package that holds the script; the rest of it is not used
needs_axe = pytest.mark.skipif(_AXE is None, reason="axe-core is missing: pip install --no-deps axe-playwright-python")
_SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--no-default-browser-check", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
_PATIENCE_S = 120.0
_VIRTUAL_MS = 5000  # that scripts of a page have, timers included
_DOCUMENT = "`<!DOCTYPE ${document.doctype?.name}>` + document.documentElement.outerHTML"
# Of parts that are made alike some stay, since axe-core takes milliseconds for each text: details are opened where they
# are the first of neighbours, and tables keep their first rows and the last one.
_UNFOLD = """document.querySelectorAll(":not(details) + details").forEach((one) => { one.open = true; });
document.querySelectorAll("section").forEach((one) => { one.style.contentVisibility = "visible"; });
document.querySelectorAll("tbody tr:nth-child(n+5):not(:last-child)").forEach((one) => one.remove());
document.querySelectorAll(".asked ~ .asked ~ .asked").forEach((one) => one.remove());"""
Json = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """The document after its scripts ran, what the page wrote to the console, the addresses it asked for."""

    dom: str
    console: list[str]
    requests: list[str]


@dataclass
class Tab:
    """A page in the browser. `events` are those that came while answers were waited for."""

    browser: "Browser"
    session: str
    events: list[Json] = field(default_factory=list[Json])

    def ask(self, method: str, **parameters: Any) -> Json:
        """The answer to a command of the protocol."""
        number = self.browser.send(method, parameters, self.session)
        while "id" not in (message := self._next()) or message["id"] != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def wait_for(self, event: str) -> None:
        """Wait for an event that has not come yet."""
        while not any(message["method"] == event for message in self.events):
            self._next()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, a promise's when it is kept."""
        found = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _next(self) -> Json:
        message = self.browser.receive()
        if "method" in message and message.get("sessionId") == self.session:
            self.events.append(message)
        return message


class Browser:
    """A Chromium that this process started; `open` gives it pages one after another."""

    def __init__(self, process: "subprocess.Popen[bytes]", reads: int, writes: int) -> None:
        self._process, self._reads, self._writes = process, reads, writes
        self._rest, self._number = b"", 0

    def send(self, method: str, parameters: Json, session: str = "") -> int:
        """Send a command; returns its number."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        content = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while content:
            content = content[os.write(self._writes, content) :]
        return self._number

    def receive(self) -> Json:
        """The next message of the browser."""
        until = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._rest:
            assert time.monotonic() < until
            block = os.read(self._reads, 1 << 20)
            assert block, f"chromium ended with code {self._process.wait()}"
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    @contextmanager
    def open(self, page: Path, width: int = 1280, scheme: str = "light") -> Iterator[Tab]:
        """A page from disk in a tab of so many pixels, after its scripts ran."""
        top = Tab(self, "")
        target = top.ask("Target.createTarget", url="about:blank")["targetId"]
        tab = Tab(self, top.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.ask(f"{domain}.enable")
        tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        tab.ask("Page.navigate", url=page.as_uri())
        tab.wait_for("Page.loadEventFired")
        yield tab
        top.ask("Target.closeTarget", targetId=target)

    def see(self, page: Path) -> Seen:
        """Open a page, let its timers run for five virtual seconds, and look."""
        with self.open(page) as tab:
            tab.ask("Emulation.setVirtualTimePolicy", policy="advance", budget=_VIRTUAL_MS)
            tab.wait_for("Emulation.virtualTimeBudgetExpired")
            dom = tab.evaluate(_DOCUMENT)
            return Seen(dom, _console(tab.events), _requests(tab.events, page.as_uri()))

    def findings(self, page: Path, width: int, scheme: str) -> list[str]:
        """The serious and critical findings of axe-core, with every kind of part unfolded; in the dark those of
        contrast, since no other rule depends on colours."""
        assert _AXE is not None
        assert _AXE.submodule_search_locations is not None
        script = Path(_AXE.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8")
        with self.open(page, width, scheme) as tab:
            tab.evaluate(_UNFOLD)
            tab.evaluate(script)
            only = "" if scheme == "light" else ", runOnly: ['color-contrast']"
            found = tab.evaluate(f"axe.run(document, {{resultTypes: ['violations']{only}}})")
        return [
            f"{one['impact']} {one['id']}: {node['html'][:200]} {node['failureSummary']}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"][:3]
        ]


@contextmanager
def running(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in a folder."""
    assert CHROMIUM is not None
    (theirs, writes), (reads, to_us) = os.pipe(), os.pipe()
    command = [CHROMIUM, *_SWITCHES, f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{to_us}', "bash", *command],
        pass_fds=(theirs, to_us), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    os.close(to_us)
    try:
        browser = Browser(process, reads, writes)
        yield browser
        browser.send("Browser.close", {})
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(reads)
        os.close(writes)


def _console(events: list[Json]) -> list[str]:
    """What a page and the browser wrote to the console about it: messages, uncaught exceptions, refused requests."""
    kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    return [json.dumps(event["params"]) for event in events if event["method"] in kinds]


def _requests(events: list[Json], own: str) -> list[str]:
    """Every address that a page asked for, but for its own and for data in the page."""
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    return sorted(url for url in urls if url != own and not url.startswith("data:"))
