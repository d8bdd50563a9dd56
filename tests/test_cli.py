"""What a user sees: exit codes, two-line errors, and commands that can be stopped, damaged and run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from prefpipe import __version__
from prefpipe import cli as command_line
from prefpipe.cli import STAGES
from prefpipe.config import base
from prefpipe.runs import tables
from prefpipe.schemas import Dropped
from tests.cases import assert_refused
from tests.conftest import ROOT, Call, Cli
from tests.waiting import until

Done = subprocess.CompletedProcess[str]
STALLING = """
import os, time
from pathlib import Path

def reward(completions, **columns):
    calls = Path(os.environ["REWARD_FOLDER"])
    number = len(list(calls.iterdir()))
    (calls / str(number)).touch()
    if number == 1:
        ACTION
    return [float(len(turns[0]["content"])) for turns in completions]
"""


def generate(cli: Cli, model: Path, prompts: Path, out: Path, *more: object, env: dict[str, str] | None = None) -> Done:
    return cli(
        "generate", "--model", model, "--prompts", prompts, "--engine", "fake", "--num-samples", 2, "--shard-rows", 2,
        "--out", out, *more, env=env,
    )  # fmt: skip


def rated(cli: Cli, model: Path, prompts: Path, out: Path, **given: dict[str, str]) -> Done:
    return generate(cli, model, prompts, out, "--rewards", "short_sentence", **given)


def data_files(out: Path) -> dict[str, bytes]:
    skipped = (".lock", ".owner", "timing.jsonl", "quarantine")
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.relative_to(out).parts[0] not in skipped
    }


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def prompt(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **more}


def test_version(shell: Cli) -> None:
    done = shell("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"prefpipe {__version__}\n", "")


@pytest.mark.parametrize("command", STAGES)
def test_the_printed_recipe_loads_and_holds_the_defaults(cli: Cli, tmp_path: Path, command: str) -> None:
    done = cli("config", command)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "recipe.toml").write_text(done.stdout)
    config_class, _ = STAGES[command]
    assert base.load(config_class, tmp_path / "recipe.toml", {}) == config_class()


def test_dry_run_prints_json_that_replays(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('rounds = 3\n[train]\nbeta = 0.2\nloss_type = ["sigmoid", "nll"]\nloss_weights = [1, 0.5]\n')
    first = cli("iterate", recipe, "--train.beta", "0.3", "--generate.prompts", "p.jsonl", "--dry-run")
    assert (first.returncode, first.stderr) == (0, "")
    resolved = json.loads(first.stdout)
    assert (resolved["rounds"], resolved["train"]["beta"], resolved["generate"]["prompts"]) == (3, 0.3, "p.jsonl")
    (tmp_path / "saved.json").write_text(first.stdout)
    second = cli("iterate", tmp_path / "saved.json", "--dry-run")
    assert second.stdout == first.stdout


BAD_USAGE = {
    "no command": ((), "iterate"),
    "unknown command": (("generat",), "generat"),
    "unknown flag": (("generate", "--num-sampels", "3"), "--num-sampels"),
    "flag of another command": (("train", "--num-samples", "3"), "--num-samples"),
    "no value": (("generate", "--limit"), "--limit"),
    "bad choice": (("generate", "--engine", "vlm", "--out", "x"), "engine = 'vlm' is not one of 'vllm'"),
    "bad number": (("generate", "--temperature", "hot", "--out", "x"), "temperature = 'hot'"),
    "two problems": (("generate", "--temperature", "3", "--seed", "-1", "--out", "x"), "temperature = '3'"),
    "unknown reward": (("evaluate", "--reward", "short_sentense", "--out", "x"), "did you mean 'short_sentence'?"),
    "no out": (("generate", "--prompts", "p.jsonl"), "--out is missing"),
    "no prompts": (("generate", "--out", "OUT"), "no prompts given"),
    "no inputs": (("score", "--out", "OUT"), "no inputs given"),
    "a part that is none": (("generate", "--part", "0/2", "--out", "x"), "part = '0/2'"),
    "a day that is none": (("score", "--template-date", "tomorrow", "--out", "x"), "template_date = 'tomorrow'"),
    "no completions": (("build-pairs", "--out", "OUT"), "no completions given"),
    "no iterate prompts": (("iterate", "--out", "OUT"), "no prompts given for generate"),
    "unknown config": (("config", "trian"), "did you mean 'train'?"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_exit_2(cli: Cli, tmp_path: Path, case: str) -> None:
    arguments, words = BAD_USAGE[case]
    done = cli(*(str(tmp_path / "out") if a in ("OUT", "x") else a for a in arguments))
    assert_refused(done, 2, words)
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_recipe_come_at_once(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('num_sampels = 3\nengine = "vlm"\n')
    assert_refused(cli("generate", recipe, "--seed", "-1", "--out", tmp_path / "o"), 2, "num_samples", "'vlm'", "seed")


def test_missing_files_are_exit_66(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    done = generate(cli, tiny_model, tmp_path / "absent.jsonl", tmp_path / "o")
    assert_refused(done, 66, str(tmp_path / "absent.jsonl"), "does not exist")
    assert_refused(cli("generate", tmp_path / "absent.toml", "--out", tmp_path / "o"), 66, "absent.toml")
    done = cli("build-pairs", "--completions", tmp_path / "absent", "--out", tmp_path / "o")
    assert_refused(done, 66, str(tmp_path / "absent"))
    assert not (tmp_path / "o").exists()


def test_a_model_without_weights_is_exit_66(cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    assert_refused(generate(cli, tmp_path / "m", prompts_file, tmp_path / "o"), 66, str(tmp_path / "m"), "no weights")


BAD_LINES = {
    "malformed JSON": ('{"messages": [', "line 3", "not valid JSON"),
    "no object": ("[1, 2]", "line 3", "not a JSON object"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_exit_65_and_named(cli: Cli, tiny_model: Path, tmp_path: Path, case: str) -> None:
    line, *words = BAD_LINES[case]
    path = write_lines(tmp_path / "prompts.jsonl", prompt("Hi."), "", line, prompt("Ho."))
    assert_refused(generate(cli, tiny_model, path, tmp_path / "o"), 65, str(path), *words)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"answer": "x"}, "missing"),
        ({"messages": [{"role": "user"}]}, "null"),
        (prompt("hi", answer=[3]), "bad_content"),
    ],
)
def test_a_faulty_row_costs_itself_alone(
    cli: Cli, tiny_model: Path, tmp_path: Path, line: dict[str, Any], reason: str
) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", prompt("Hi."), "", line, prompt("Ho."))
    done = generate(cli, tiny_model, path, tmp_path / "o")
    assert done.returncode == 0, done.stderr
    (row,) = tables.read_table(tmp_path / "o" / "dropped.parquet", Dropped).to_pylist()
    assert (row["id"], row["reason"]) == (f"{path}, line 3", reason)


def test_half_an_emoji_is_no_unexpected_error(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    lines = (prompt("Hi."), '{"messages": [{"role": "user", "content": "cut \\ud83d"}]}')  # JSON that is no valid text
    done = generate(cli, tiny_model, write_lines(tmp_path / "p.jsonl", *lines), tmp_path / "o")
    assert "unexpected" not in done.stderr, done.stderr
    assert done.returncode in (0, 65)


def test_prompts_that_are_all_faulty_are_exit_65(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", prompt("Say <|im_end|>."), prompt("  "))
    assert_refused(generate(cli, tiny_model, path, tmp_path / "o"), 65, "no prompt is left", "control_tokens", "empty")


def test_faulty_prompts_are_in_the_ledger_with_their_reason(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "p.jsonl",
        *(prompt("Hi."), prompt("Say <|im_end|>."), prompt(" "), prompt("x" * 200), prompt("Hi."), prompt("Ho.")),
        {"messages": [{"role": "wizard", "content": "Hi."}]},
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]},
    )
    done = generate(cli, tiny_model, path, tmp_path / "o", "--max-prompt-tokens", 100)
    assert done.returncode == 0, done.stderr
    assert "4 completions of 2 prompts" in done.stdout
    ledger = pq.read_table(tmp_path / "o" / "dropped.parquet").to_pylist()
    expected = ["duplicate", "control_tokens", "empty", "too_long", "bad_roles", "bad_roles"]
    assert [row["reason"] for row in ledger] == expected
    assert "line 5" in ledger[0]["detail"]
    assert "dropped.parquet" in done.stderr


def test_another_run_in_out_is_exit_2_and_lists_the_keys(
    cli: Cli, tiny_model: Path, other_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    assert rated(cli, tiny_model, prompts_file, tmp_path / "g").returncode == 0
    before = data_files(tmp_path / "g")
    done = generate(cli, other_model, prompts_file, tmp_path / "g", "--seed", "7", "--rewards", "short_sentence")
    assert_refused(done, 2, str(tmp_path / "g"), "seed: 0 there, 7 now", "input:policy: ", "--force")
    assert "num_samples" not in done.stderr
    assert data_files(tmp_path / "g") == before
    done = generate(cli, tiny_model, prompts_file, tmp_path / "g", "--seed", "7", "--force")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "g" / "quarantine").iterdir())) > 3


def test_the_second_run_of_a_command_says_complete(
    cli: Cli, shell: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    first = rated(cli, tiny_model, prompts_file, tmp_path / "g")
    before = data_files(tmp_path / "g")
    second = rated(cli, tiny_model, prompts_file, tmp_path / "g")
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "is complete already" in second.stderr
    assert data_files(tmp_path / "g") == before
    pairs = ("build-pairs", "--completions", tmp_path / "g", "--reward", "short_sentence", "--out", tmp_path / "p")
    first, second = cli(*pairs), cli(*pairs)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "is complete already" in second.stderr
    replay = shell("build-pairs", tmp_path / "p" / "config.json", "--out", tmp_path / "replayed")  # hashes differ there
    assert replay.returncode == 0, replay.stderr
    assert data_files(tmp_path / "replayed") == data_files(tmp_path / "p")


def test_a_flipped_bit_in_a_pairs_shard_stops_train_and_names_the_file(
    cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    assert rated(cli, tiny_model, prompts_file, tmp_path / "g").returncode == 0
    build = ("build-pairs", "--completions", tmp_path / "g", "--reward", "short_sentence", "--out", tmp_path / "p")
    assert cli(*build).returncode == 0
    part = tmp_path / "p" / "pairs" / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 16
    part.write_bytes(content)
    done = cli("train", "--model", tiny_model, "--pairs", tmp_path / "p", "--out", tmp_path / "t")
    assert_refused(done, 65, str(part), "damaged")
    again = cli(*build)  # as the hint says
    assert again.returncode == 0, again.stderr
    assert "quarantine" in again.stderr


@pytest.mark.parametrize(
    "arguments",
    [("hf://o/n/r.toml",), ("--out", "s3://bucket/t"), ("--pairs", "s3://bucket/p.jsonl", "--out", "t")],
)
def test_an_address_is_refused_as_it_was_written(call: Call, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = call("train", *arguments)
    assert done.code == 2
    assert next(a for a in arguments if "://" in a) in done.stderr
    assert not Path("s3:").exists()


@pytest.mark.parametrize("fault", ["write:1:enospc", "fsync:9:eio", "append:1:enospc"])
def test_a_full_disk_is_exit_74_and_a_rerun_succeeds(
    cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path, fault: str
) -> None:
    words = ("no space left on the disk",) if fault.endswith("enospc") else ("Input/output error",)
    done = rated(cli, tiny_model, prompts_file, tmp_path / "g", env={"PREFPIPE_FAULT": fault})
    assert_refused(done, 74, str(tmp_path / "g"), *words)
    assert not list(tmp_path.rglob(".*.tmp"))
    done = rated(cli, tiny_model, prompts_file, tmp_path / "g")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "g" / "quarantine").exists()


def test_sigterm_is_exit_143_and_resumes(cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    env = {"PREFPIPE_FAULT": "write:13:sigterm"}  # 3 writes before the first shard, 8 in each: inside the second
    done = rated(cli, tiny_model, prompts_file, tmp_path / "g", env=env)
    assert_refused(done, 143, "stopped by signal 15", "resumes")
    assert not list(tmp_path.rglob(".*.tmp"))
    kept = tmp_path / "g" / "completions" / "part-00000.parquet"
    written = kept.stat().st_mtime_ns
    assert not (tmp_path / "g" / "completions" / "part-00001.parquet").exists()
    assert rated(cli, tiny_model, prompts_file, tmp_path / "g").returncode == 0
    assert kept.stat().st_mtime_ns == written


def with_own_reward(model: Path, prompts: Path, folder: Path, action: str) -> tuple[list[str], dict[str, str], Path]:
    """A command whose user-written reward does `action` while it rates the second shard."""
    folder.mkdir()
    (folder / "calls").mkdir()
    (folder / "own.py").write_text(STALLING.replace("ACTION", action))
    command = [
        sys.executable, "-m", "prefpipe", "generate", "--model", str(model), "--prompts", str(prompts), "--engine",
        "fake", "--num-samples", "2", "--shard-rows", "2", "--rewards", "own:reward", "--out", "g",
    ]  # fmt: skip
    paths = {"PYTHONPATH": str(ROOT), "REWARD_FOLDER": str(folder / "calls"), "OMP_NUM_THREADS": "1"}
    return command, {**os.environ, **paths}, folder


def test_ctrl_c_is_exit_130_and_resumes(cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    command, env, folder = with_own_reward(tiny_model, prompts_file, tmp_path / "w", "time.sleep(600)")
    with subprocess.Popen(
        command, env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        until((folder / "calls" / "1").exists)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert_refused(Done(command, process.returncode, stdout, stderr), 130, "stopped by signal 2", "resumes")
    again = cli(*command[3:], env=env, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "12 completions of 6 prompts" in again.stdout


SIGNALS_OF_USERS = {
    "in a reward": "import signal; os.kill(os.getpid(), signal.SIGTERM)",
    "in a destructor": "type('D', (), {'__del__': lambda _: os.kill(os.getpid(), 15)})(); time.sleep(60)",
    "in a callback": "import weakref; weakref.ref(set(), lambda _: os.kill(os.getpid(), 15)); time.sleep(60)",
}


@pytest.mark.parametrize("place", SIGNALS_OF_USERS)
def test_sigterm_inside_code_of_users_stops_too(
    cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path, place: str
) -> None:
    """Python drops what is raised in a destructor or a callback: the signal comes again."""
    command, env, folder = with_own_reward(tiny_model, prompts_file, tmp_path / "w", SIGNALS_OF_USERS[place])
    done = cli(*command[3:], env=env, cwd=folder)
    assert_refused(done, 143, "stopped by signal 15")
    assert "ignored" not in done.stderr


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["a terminal", "nohup"])
def test_a_terminal_that_closes_stops_a_command_but_for_nohup(call: Call, before: signal.Handlers) -> None:
    kept = signal.signal(signal.SIGHUP, before)
    try:
        call("recipes")  # the handlers of a command
        assert signal.getsignal(signal.SIGHUP) is (before if before is signal.SIG_IGN else command_line._stop)
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_a_signal_that_falls_into_the_hook_for_lost_ones_comes_again(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    call("recipes")  # the handlers of a command
    monkeypatch.setattr(command_line, "_send_again", sent.append)
    monkeypatch.setattr(sys, "__unraisablehook__", lambda _: signal.raise_signal(signal.SIGTERM))
    sys.unraisablehook(SimpleNamespace(exc_value=ValueError()))
    assert sent == [signal.SIGTERM]


def test_two_writers_are_exit_75(cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from prefpipe.runs import fsio\n"
        "with fsio.lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "g")], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        owner.stdout.readline()
        done = rated(cli, tiny_model, prompts_file, tmp_path / "g")
        owner.communicate("")
    assert_refused(done, 75, str(tmp_path / "g"), f"process {owner.pid}")


def test_verbose_shows_the_traceback_of_an_unexpected_error_only(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    done = cli("build-pairs", "--completions", tmp_path / "broken", "--out", tmp_path / "p", "--verbose")
    assert_refused(done, 66, "no complete run")


@pytest.mark.parametrize(
    ("engine", "package", "install"),
    [
        ("transformers", "torch", f"make -C {ROOT} setup"),
        ("vllm", "vllm", f"make -C {ROOT} setup or make -C {ROOT} setup LOCK=cuda"),
    ],
)
def test_a_missing_extra_names_the_install_line(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, engine: str, package: str, install: str
) -> None:
    block = f"import sys; sys.modules['{package}'] = None; from prefpipe.cli import main; main()"
    arguments = ("generate", "--model", tiny_model, "--prompts", prompts_file, "--engine", engine, "--out",
                 tmp_path / "g")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", block, *map(str, arguments)], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert_refused(done, 66, f"needs the package '{package}'", f"{install}\n")


def test_words_go_to_stderr_and_data_to_stdout(cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    done = rated(cli, tiny_model, prompts_file, tmp_path / "g")
    assert "starting engine fake" in done.stderr
    assert "sampling: 6/6 prompts" in done.stderr
    assert done.stdout.startswith("12 completions of 6 prompts in ")
    assert "\x1b" not in done.stdout + done.stderr
