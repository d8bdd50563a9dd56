"""The page as HTML: the sections through their templates, with one style sheet, one script, and a policy that lets no
other script run and nothing be fetched.

Templates escape every text. What they take as markup is made here or by Vega.
"""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefpipe import __version__, clock
from prefpipe.stages.report import playground
from prefpipe.stages.report.subject import Subject
from prefpipe.stages.report.texts import shown

LAYOUT = (  # section, its heading, its anchor
    ("verdict", "What is this, and is it good?", "good"),
    ("data", "What went in?", "in"),
    ("training", "What happened?", "happened"),
    ("answers", "What does it say now?", "says"),
    ("origin", "How was it made?", "made"),
    ("playground", "The playground", "playground"),
)


def html(subject: Subject, sections: Mapping[str, Any], failures: Mapping[str, str]) -> str:
    """The page of a subject. `sections` has None for one that could not be made, and `failures` says why."""
    style, script = _asset("templates/style.css"), _asset("templates/page.js")
    width, height = playground.SIZE
    return (
        _templates()
        .get_template("page.html.jinja")
        .render(
            layout=LAYOUT,
            sections=sections,
            failures=failures,
            title=shown(subject.root.name, 200),
            place=shown(str(subject.root.path), 500),
            policy=_policy(script),
            style=style,
            script=script,
            version=__version__,
            written=clock.utc_now(),
            losses=list(playground.curves()["losses"]),
            tokens=playground.curves()["tokens"],
            curves=_asset("curves.json"),
            scales={
                name: f"{width} {height} {playground.REACH} {low} {high}"
                for name, (low, high) in playground.FRAMES.items()
            },
        )
    )


def _policy(script: str) -> str:
    """The Content-Security-Policy: this script by its digest, inline styles, and nothing from anywhere."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _templates() -> Environment:
    """Compiled once in a process."""
    return Environment(
        loader=PackageLoader("prefpipe.stages.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Markup:
    """A file of the package that goes into the page as it is."""
    return Markup(resources.files("prefpipe.stages.report").joinpath(name).read_text("utf-8"))
