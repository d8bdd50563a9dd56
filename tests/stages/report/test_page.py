"""The page is whole, asks for nothing, and what others wrote in it is text."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prefpipe.runs import overview
from prefpipe.runs.overview import Gap
from prefpipe.stages.report import origin, page, stage
from prefpipe.stages.report.subject import read
from tests.stages.report import browser, cases, hostile
from tests.stages.report.browser import Browser
from tests.stages.report.conftest import ALERTS

TEXTS = hostile.TEXTS


pytestmark = pytest.mark.slow
ACTIVE = {"img", "iframe", "object", "embed", "base", "form", "math", "video", "marquee", "image", "use"}


class Tags(HTMLParser):
    """Every tag with its attributes, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def alert(text: str) -> dict[str, object]:
    return {"rule": text, "level": "WARN", "step": 3, "message": text, "advice": text}


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose prompts, completions, reasons, alerts, settings and path are hostile."""
    folder = tmp_path_factory.mktemp("hostile") / '"><img src=x onerror=alert(1)>{{7*7}}'
    few = [text.replace("\0", "") for text in TEXTS]
    shape = cases.Shape(
        rounds=1,
        prompts=len(few),
        samples=2,
        pairs=len(few),
        steps=12,
        topic=lambda number: few[number % len(few)],
        answer=lambda number, round: few[(number + round) % len(few)],
        reason=few[0],
        alerts=[alert(text[:4000]) for text in few],
        config={"chat_template": few[1], "lora_target_modules": few[2]},
    )
    cases.iterate_run(folder, shape)
    out = folder.parent / "page.html"
    stage.run(folder, out)
    return out


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser.running(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def good_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return stage.run(cases.iterate_run(folder / "run", cases.Shape(alerts=ALERTS)), folder / "page.html")


def test_there_are_sixty_texts_and_all_are_tried() -> None:
    assert len(set(TEXTS)) == 60


def test_hostile_text_is_text(hostile_page: Path) -> None:
    """Without a browser: one script and one block of data, no handler, no address, no control character."""
    text = hostile_page.read_text()
    assert len(text) < 5_000_000
    tags = Tags(text).found
    assert [attributes for tag, attributes in tags if tag == "script"] == [
        {"type": "application/json", "id": "curves"},
        {},
    ]
    assert not {tag for tag, _ in tags} & ACTIVE
    assert len([tag for tag, _ in tags if tag == "style"]) == 1
    names = {name for _, attributes in tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not names & {"src", "srcset", "srcdoc", "action", "formaction", "background"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert "{{ 7 * 7 }}" in text


@browser.needs_browser
def test_hostile_text_does_nothing_in_a_browser(hostile_page: Path, chromium: Browser) -> None:
    seen = chromium.see(hostile_page)
    assert seen.console == []
    assert seen.requests == []
    assert re.match(r'<!DOCTYPE html>\s*<html lang="en">', seen.dom)
    assert "evil.example" in seen.dom  # it was there, as text


@browser.needs_browser
def test_a_browser_sees_what_a_careless_page_does(tmp_path: Path, chromium: Browser) -> None:
    """The control: the same texts, not escaped and without a policy, run and ask."""
    careless = tmp_path / "careless.html"
    careless.write_text(f"<html lang='en'><body>{hostile.TEXTS[0]}{hostile.TEXTS[16]}</body></html>")
    seen = chromium.see(careless)
    assert seen.console
    assert {url for url in seen.requests if "evil.example" in url} >= {"http://evil.example/f"}
    assert 'data-ran="1"' in seen.dom


@browser.needs_browser
def test_the_script_of_the_page_runs(good_page: Path, chromium: Browser) -> None:
    """Its digest stands in the policy: the filter counts, the sliders say their value, a line is drawn."""
    seen = chromium.see(good_page)
    assert (seen.console, seen.requests) == ([], [])
    assert re.search(r'id="count"[^>]*>12 of 12 shown, 12 in all<', seen.dom)
    assert re.search(r"<output>0\.1</output>", seen.dom)
    assert re.search(r'data-at-0="">0\.6931<', seen.dom)
    assert re.search(r'id="policy-beta-value">0\.1<', seen.dom)


@browser.needs_browser
@browser.needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everybody_can_use_the_page(good_page: Path, chromium: Browser, width: int, scheme: str) -> None:
    assert chromium.findings(good_page, width, scheme) == []


@browser.needs_browser
@browser.needs_axe
def test_axe_finds_what_a_careless_page_does(tmp_path: Path, chromium: Browser) -> None:
    """The control: one text is pale in the dark alone, and a field has no label."""
    careless = tmp_path / "careless.html"
    style = ":root{color-scheme:light dark} body{background:#fff;color:#111}"
    style += "@media (prefers-color-scheme:dark){body{background:#333}}"
    careless.write_text(f"<html lang=en><title>x</title><style>{style}</style><body><p>text<p><input>")
    light, dark = (chromium.findings(careless, 1280, scheme) for scheme in ("light", "dark"))
    assert [one.split(":")[0] for one in light] == ["critical label"]
    assert {one.split(":")[0] for one in dark} == {"serious color-contrast"}


@browser.needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_as_wide_as_the_window(good_page: Path, chromium: Browser, width: int) -> None:
    with chromium.open(good_page, width) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_a_page_is_sound(good_page: Path) -> None:
    """Language, one h1, headings in order, labels, ids once, anchors that lead somewhere, hidden drawings named."""
    text = good_page.read_text()
    assert '<html lang="en">' in text
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    for field in re.findall(r"<(?:input|select)[^>]*>", text):
        before = text[: text.index(field)]
        assert before.rindex("<label>") > before.rfind("</label>"), field
    for figure in re.findall(r"<figure>.*?</figure>", text, re.DOTALL):
        assert "<figcaption><b>" in figure
        assert '<svg aria-hidden="true"' in figure


def test_nothing_leads_out_of_the_page(good_page: Path) -> None:
    tags = Tags(good_page.read_text()).found
    (policy,) = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-")
    links = [value for _, attributes in tags for name, value in attributes.items() if name in ("href", "xlink:href")]
    assert [link for link in links if not str(link).startswith("#")] == ["data:,"]


def test_a_section_that_failed_says_so(tmp_path: Path) -> None:
    subject = read(cases.iterate_run(tmp_path / "run", cases.Shape(rounds=1)))
    text = page.html(subject, {name: None for name, *_ in page.LAYOUT}, {n: "<KeyError>" for n, *_ in page.LAYOUT})
    assert text.count("This part could not be made: &lt;KeyError&gt;") == 6


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    subject = read(cases.iterate_run(tmp_path / "run", cases.Shape(rounds=1)))
    gap = Gap("runs/<gone>", "it is not there any more")
    assert origin.origin(replace(subject, gaps=[gap])).gaps == [("runs/<gone>", gap.why)]
    assert overview.look(tmp_path / "run").gaps == ()
