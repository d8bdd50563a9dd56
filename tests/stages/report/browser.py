"""Pages in a headless Chromium: what they log, ask for and become. No driver: the browser's own switches."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
_OURS = re.compile(r"CONSOLE[:(].*")
_BROWSERS_OWN = re.compile(r"(https?://[\w.]*\.(google|googleapis|gvt1)\.com/|data:|chrome|devtools:|about:)")


@dataclass(frozen=True)
class Seen:
    """The document after its scripts ran, what the page wrote to the console, the addresses it asked for."""

    dom: str
    console: list[str]
    requests: list[str]


def open_page(page: Path, folder: Path) -> Seen:
    """Open a page from disk, let its scripts run for five virtual seconds, and look."""
    assert CHROMIUM is not None
    net = folder / "net.json"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", "--no-default-browser-check",
            "--disable-dev-shm-usage", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={net}", "--net-log-capture-mode=Everything", "--virtual-time-budget=5000", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, errors="replace", timeout=120, check=True,
    )  # fmt: skip
    console = [found[0] for line in done.stderr.splitlines() if (found := _OURS.search(line))]
    return Seen(done.stdout, console, _requests(net.read_text(errors="replace")))


def _requests(log: str) -> list[str]:
    """Every address in the log of the network, but for those that the browser asks for by itself."""
    try:
        events = json.loads(log)["events"]
    except json.JSONDecodeError:  # the browser ended before it closed the list
        events = json.loads(log.rstrip().rstrip(",") + "]}")["events"]
    urls = {str((event.get("params") or {}).get("url", "")) for event in events}
    return sorted(url for url in urls if url and not _BROWSERS_OWN.match(url))
