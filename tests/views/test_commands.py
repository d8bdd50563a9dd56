"""`show`, `runs` and `compare` through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import assert_refused
from tests.conftest import ROOT, Cli
from tests.views.conftest import HOSTILE, LETTERS


def test_show_says_what_a_run_is(cli: Cli, runs: Path) -> None:
    done = cli("show", runs / "g")
    assert done.returncode == 0, done.stderr
    for word in ("generate", "complete", "18 completions of 6 prompts", "max_tokens", "ref_logps", "short_sentence"):
        assert word in done.stdout


def test_rows_are_shown_as_conversations_and_obey_nothing(cli: Cli, runs: Path) -> None:
    done = cli("show", runs / "g", "--where", "sample_index = 0")
    assert done.returncode == 0, done.stderr
    assert "user  Tell me about kettle." in done.stdout
    assert "6 of 6 matching rows, 18 completions in all" in done.stdout
    assert "[bold]</pre><script>alert(1)</script>\\x1b[31m\\u202e{{x}}" in done.stdout.replace("\n", "")
    assert not {"\x1b", "\u202e"} & set(done.stdout)


def test_rows_as_json_have_every_column(cli: Cli, runs: Path) -> None:
    done = cli("show", runs / "p", "--limit", 2, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2
    assert all(row["chosen_token_ids"] and row["reward_gap"] is not None for row in rows)
    assert done.stdout.isascii()
    whole = json.loads(cli("show", runs / "p", "--json").stdout)
    assert (whole["state"], whole["config"]["reward"]) == ("complete", LETTERS)


def test_runs_lists_states_and_what_each_was_made_from(cli: Cli, runs: Path) -> None:
    listed = {Path(r["path"]).name: r for r in json.loads(cli("runs", runs, "--json").stdout)}
    assert {name: r["command"] for name, r in listed.items()} == {
        "e": "evaluate", "f": "evaluate", "g": "generate", "p": "build-pairs",
    }  # fmt: skip
    assert [Path(p).name for p in listed["p"]["made_from"]] == ["g"]
    drawn = cli("runs", runs).stdout
    assert "18 completions of 6 prompts" in drawn
    assert_refused(cli("runs", runs / "g/completions"), 66, "no run below")


def test_compare_names_what_differs_and_what_is_shared(cli: Cli, runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = cli("compare", runs / "e", runs / "f", "--html", page)
    assert done.returncode == 0, done.stderr
    assert "limit" in done.stdout
    assert "seed" in done.stdout
    found = json.loads(cli("compare", runs / "e", runs / "f", "--json").stdout)
    assert found["settings"] == {"limit": [0, 5], "seed": [0, 1]}
    assert {"ids": "prompt_id", "counts": [6, 5], "shared_with_first": [6, 5]} in found["overlap"]
    assert found["results"]["prompts"] == [6, 5]
    text = page.read_text()
    assert "short_sentence" not in text
    assert "<script" not in text
    assert "seed" in text


@pytest.mark.parametrize(
    "line", ["compare g", "show nowhere", "show g --dataset x", "show g --worst -1", "compare g p --html ."]
)
def test_what_cannot_be_shown_is_one_error(cli: Cli, runs: Path, line: str) -> None:
    assert_refused(cli(*line.split(), cwd=runs), 66 if "nowhere" in line else 2)


def test_hostile_texts_are_planted(runs: Path) -> None:
    assert HOSTILE.encode()[:8] in (runs / "prompts.jsonl").read_bytes()


LOOK = """
import sys
sys.path.insert(0, {root!r})
from prefpipe.cli import main
try:
    main()
finally:
    print(sorted({{"torch", "transformers", "vllm"}} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", [["show", "g"], ["show", "p", "--limit", "1"], ["runs", "."], ["compare", "e", "f"]]
)
def test_looking_loads_no_heavy_package(runs: Path, arguments: list[str]) -> None:
    words = [sys.executable, "-c", LOOK.format(root=str(ROOT)), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, cwd=runs, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
