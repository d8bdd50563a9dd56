"""`push` as a user calls it."""

import re
from pathlib import Path

import pytest

from tests.cases import assert_refused
from tests.conftest import Cli
from tests.exports.stand_in import TOKEN, hub

ALONE = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("hf:me/x",), 2, "say who may see it: --public or --private"),
        (("hf:me/x", "--public", "--private"), 2, "say who may see it"),
        (("hf:me/x", "--dry-run"), 2, "say who may see it"),
        (("me/x", "--private"), 2, "me/x names no repository"),
        (("hf:me/x@main", "--private"), 2, "names no repository"),
        (("hf:me", "--private"), 2, "names no repository"),
    ],
)
def test_nothing_is_sent_by_default(cli: Cli, paired: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    with hub() as running:
        assert_refused(cli("push", paired, *arguments, env={**ALONE, "HF_ENDPOINT": running.url}), code, said)
        assert running.asked == []


def test_a_dry_run_shows_files_bytes_and_who_sees_them(cli: Cli, paired: Path) -> None:
    done = cli("push", paired, "hf:me/pairs", "--public", "--dry-run", env={"HF_TOKEN": ""})
    assert done.returncode == 0, done.stderr
    *files, last, end = done.stdout.splitlines()
    assert [line.split()[-1] for line in files] == ["README.md", "data_report.json", "pairs/part-00000.parquet"]
    assert all(re.fullmatch(r" +[\d.]+ (B|KiB)  \S+", line) for line in files)
    assert re.fullmatch(r"3 files, [\d.]+ KiB, to the public dataset repository me/pairs", last)
    assert end == "nothing was sent: leave out --dry-run to send it"


def test_it_arrives_and_a_second_time_it_is_there_already(shell: Cli, paired: Path) -> None:
    with hub() as running:
        environment = {**ALONE, "HF_ENDPOINT": running.url}
        done = shell("push", paired, "hf:me/pairs", "--private", env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"pushed       {running.url}/datasets/me/pairs/commit/1\n"
        assert "3 files" in done.stderr
        repository = running.repositories["datasets/me/pairs"]
        assert repository.private
        assert repository.files["pairs/part-00000.parquet"] == (paired / "pairs" / "part-00000.parquet").read_bytes()
        again = shell("push", paired, "hf:me/pairs", "--private", env=environment)
        assert_refused(again, 2, "me/pairs exists already", "--update")
        assert TOKEN not in done.stdout + done.stderr + again.stderr
