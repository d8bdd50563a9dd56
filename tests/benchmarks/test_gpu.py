"""benchmarks/gpu.py: how checks are run, watched and noted; every check on tiny sizes; what it imports."""

import ast
import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from prefpipe.forward.layout import Span
from tests.conftest import ROOT

Event = dict[str, Any]


@pytest.fixture(scope="module")
def card() -> Iterator[Callable[[str], ModuleType]]:
    """Modules of the benchmark by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture
def bench(card: Callable[[str], ModuleType]) -> Any:
    sizes = card("card.sizes")
    return sizes.Bench(sizes.tiny(torch.device("cpu")))


def figure(check: str, **values: Any) -> Event:
    return {"check": check, "kind": "figure", "figure": {"name": "speed", "value": 1.0, "unit": "x", **values}}


def test_the_file_is_whole_after_every_event_and_the_table_says_all(card: Callable, tmp_path: Path) -> None:
    record = card("card.record")
    path = tmp_path / "gpu.json"
    kept = record.Record(path, "python benchmarks/gpu.py --json FILE", ["a", "b"])
    for event in (
        {"check": "a", "kind": "start", "state": "running"},
        {"check": "a", "kind": "fact", "name": "card", "text": "H200"},
        figure("a", goal=1.5),
        figure("a", name="step", value=1.05, goal=1.1, at_most=True),
        figure("a", name="lost", value=math.nan, goal=1.1, at_most=True),
        figure("a", name="tokens", value=123456.0),
        {"check": "a", "kind": "end", "state": "done", "why": "", "seconds": 2.0},
        {"check": "b", "kind": "end", "state": "left out", "why": "no time"},
    ):
        kept.take(event)
        assert json.loads(path.read_text(), parse_constant=pytest.fail) == kept.content
    first, second = json.loads(path.read_text())["checks"]
    assert [f["met"] for f in first["figures"]] == [False, True, False, None]
    assert (first["state"], second["state"], second["why"]) == ("done", "left out", "no time")
    page = record.table(kept.content)
    for line in (
        "- card: H200",
        "| a | speed | 1 | x | >= 1.5 | MISSED |",
        "| a | step | 1.05 | x | <= 1.1 | met |",
        "| a | lost | no number | x | <= 1.1 | MISSED |",
        "| a | tokens | 1.235e+05 | x |  |  |",
        "| b | left out |  | no time |",
        "1 of 3 goals met; 1 of 2 checks done.",
    ):
        assert line in page.splitlines()


def test_checks_that_fail_pass_their_limit_or_do_not_fit_leave_the_others_alone(card: Callable) -> None:
    """A clock that the checks move: 100 s in all."""
    worker, now, events, freed = card("card.worker"), SimpleNamespace(at=0.0), [], []
    found = card("card.record").Figure("f", 1.0)

    def spends(*seconds: float) -> Callable[[Any], Iterator[Any]]:
        def work(_bench: Any) -> Iterator[Any]:
            for each in seconds:
                now.at += each
                yield found

        return work

    def breaks(_bench: Any) -> Iterator[Any]:
        yield found
        raise RuntimeError("\nno kernel\nfor this")

    def lacks(_bench: Any) -> Iterator[Any]:
        raise worker.NotAtHand("trl is not installed")
        yield

    checks = [
        worker.Check("whole", 30, 5, spends(10, 10)),
        worker.Check("broken", 30, 5, breaks),
        worker.Check("slow", 30, 5, spends(20, 20, 20)),
        worker.Check("absent", 30, 5, lacks),
        worker.Check("large", 50, 45, spends(1)),
        worker.Check("last", 100, 5, spends(35, 35)),
    ]
    bench = SimpleNamespace(release=lambda: freed.append("rest"), drop=lambda: freed.append("model too"))
    worker.run(checks, bench, events.append, 100.0, lambda: now.at)
    ends = {e["check"]: (e["state"], e["why"]) for e in events if e["kind"] == "end"}
    assert ends == {
        "whole": ("done", ""),
        "broken": ("failed", "RuntimeError: no kernel"),
        "slow": ("cut", "its 30 s are over: what would follow is left out"),
        "absent": ("left out", "trl is not installed"),
        "large": ("left out", "40 s are left before the deadline, it needs 45"),
        "last": ("cut", "its 40 s are over: what would follow is left out"),
    }
    counts = {name: sum(e["check"] == name and e["kind"] == "figure" for e in events) for name in ends}
    assert counts == {"whole": 2, "broken": 1, "slow": 2, "absent": 0, "large": 0, "last": 2}
    assert freed == ["rest"] + ["model too"] * 4  # what a check broke off in the middle left must not reach the next


def test_a_card_that_answers_no_more_ends_the_process_after_the_event(card: Callable) -> None:
    worker, events = card("card.worker"), []

    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checks = [worker.Check(name, 30, 5, lambda _: iter(())) for name in ("a", "b")]
    with pytest.raises(SystemExit):
        worker.run(checks, SimpleNamespace(release=dead), events.append, time.time() + 100)
    assert [(e["check"], e["state"]) for e in events] == [("a", "running"), ("a", "failed")]


WORKER = """
import json, os, sys, time
pipe, *names = sys.argv[1:]
def tell(check, kind, **rest):
    os.write(int(pipe), (json.dumps({"check": check, "kind": kind, **rest}) + "\\n").encode())
for name in names:
    if name == "absent":
        time.sleep(60)
    tell(name, "start", state="running")
    tell(name, "figure", figure={"name": "pid", "value": os.getpid()})
    if name == "dies":
        os._exit(7)
    if name == "breaks":
        tell(name, "end", state="failed", why="no answer", seconds=0.1)
        sys.exit(1)
    if name == "hangs":
        time.sleep(60)
    tell(name, "end", state="done", why="", seconds=0.1)
"""


def test_what_hangs_is_killed_what_dies_is_noted_and_the_rest_goes_on(card: Callable, tmp_path: Path) -> None:
    worker, record = card("card.worker"), card("card.record")
    names = ["first", "hangs", "second", "dies", "breaks", "third"]
    checks = [worker.Check(name, 2, 0.1, iter) for name in names]
    kept = record.Record(tmp_path / "r.json", "", names)
    card("card.supervise").supervise(
        kept, checks, lambda left, pipe: [sys.executable, "-c", WORKER, str(pipe), *left], time.time() + 600,
        start=120, grace=1,
    )  # fmt: skip
    found = {c["name"]: (c["state"], c["why"]) for c in kept.content["checks"]}
    assert found == {
        "first": ("done", ""), "second": ("done", ""), "third": ("done", ""),
        "hangs": ("failed", "it went on past its time and was killed"),
        "dies": ("failed", "its process ended with code 7"), "breaks": ("failed", "no answer"),
    }  # fmt: skip
    processes = [c["figures"][0]["value"] for c in kept.content["checks"]]
    assert [a == b for a, b in itertools.pairwise(processes)] == [True, False, True, False, False]


def test_processes_that_begin_no_check_end_all_and_no_time_leaves_the_rest_out(card: Callable, tmp_path: Path) -> None:
    """Such as those of a machine without transformers: the next one would need as long to find out."""
    worker, record = card("card.worker"), card("card.record")
    checks = [worker.Check("absent", 1, 0.1, iter), worker.Check("first", 1, 0.1, iter)]
    long = worker.Check("long", 100, 50, iter)
    for taken, text, why, start in (
        (checks, WORKER, ("failed", "its process did not start"), 1),
        (checks, "raise SystemExit(3)", ("failed", "its process ended with code 3"), 120),
        ([long, long], WORKER, ("left out", "no time is left before the deadline"), 120),
    ):
        kept = record.Record(tmp_path / "r.json", "", [check.name for check in taken])

        def command(left: list[str], pipe: int, text: str = text) -> list[str]:
            return [sys.executable, "-c", text, str(pipe), *left]

        card("card.supervise").supervise(kept, taken, command, time.time() + 20, start=start, grace=0.5)
        assert {(c["state"], c["why"]) for c in kept.content["checks"] if c["name"] != "long"} <= {why}
        assert kept.content["checks"][0]["state"] == why[0]


def test_a_process_gets_one_card_and_no_hub(card: Callable) -> None:
    environment = card("card.supervise")._environment
    for shown, one in (({}, "0"), ({"CUDA_VISIBLE_DEVICES": "GPU-5,1"}, "GPU-5"), ({"CUDA_VISIBLE_DEVICES": ""}, "")):
        found = environment({"HOME": "/h", **shown})
        assert (found["CUDA_VISIBLE_DEVICES"], found["HF_HUB_OFFLINE"], found["HOME"]) == (one, "1", "/h")


def test_a_process_that_cannot_die_holds_nobody_up(card: Callable, monkeypatch: Any) -> None:
    """SIGKILL reaches no process that waits inside the driver."""
    supervise, calls = card("card.supervise"), []

    class Stuck:
        pid = 7

        def wait(self, timeout: float | None = None) -> None:
            calls.append(timeout)
            raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr(supervise.os, "killpg", lambda *_: None)
    supervise._end(Stuck(), hangs=True)
    assert calls == [0, supervise.DEATH]


def test_operations_of_a_row(card: Callable) -> None:
    """By hand: 2 layers of 2 * 4 * 2 * (2 + 1) + 3 * 4 * 8 = 144 weights; a trunk of 3 tokens and completions of 2 and
    1 see 6 + (6 + 3) + (3 + 1) = 19 keys."""
    measure = card("card.measure")
    config: Any = SimpleNamespace(
        hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=2, vocab_size=10,
    )  # fmt: skip
    assert measure.body_operations(config) == 2 * 2 * 144
    spans = [Span(0, 3, ((3, 2), (5, 1)))]
    attention, head = 4 * 19 * 2 * 2 * 2, 2 * 10 * 4 * 3
    assert measure.operations(config, spans, 3, training=False) == 576 * 6 + attention + head
    assert measure.operations(config, spans, 3, training=True) == 2 * 576 * 6 + 3 * attention + 2 * head


def test_rows_of_a_case(card: Callable) -> None:
    sizes = card("card.sizes")
    two, eight = sizes.rows(sizes.Case(5, 3, 2, 4), 50), sizes.rows(sizes.Case(5, 3, 8, 1), 50)
    assert [len(two), len(eight)] == [4, 16]
    assert len({p.prompt_ids for p in two}) == 4
    assert len({p.prompt_ids for p in eight}) == 1
    assert len({p.pair_id for p in eight}) == 16
    assert {len(p.chosen) + len(p.prompt_ids) for p in [*two, *eight]} == {8}


@pytest.mark.slow
def test_every_check_runs_on_tiny_sizes(card: Callable, bench: Any) -> None:
    """All but those that have a test of their own; in their order, one bench. Goals of speed mean nothing here."""
    gpu, worker, events = card("gpu"), card("card.worker"), []
    ours = [c for c in gpu.CHECKS if c.name not in ("TRL", "FlexAttention")]
    worker.run(ours, bench, events.append, time.time() + 1000)
    assert {e["check"]: (e["state"], e["why"]) for e in events if e["kind"] == "end"} == {
        c.name: ("done", "") for c in ours
    }
    figures = [card("card.record").Figure(**e["figure"]) for e in events if e["kind"] == "figure"]
    assert all(math.isfinite(f.value) and f.value >= 0 for f in figures)
    assert {f.met for f in figures if f.name.startswith(("error", "largest difference"))} == {True}
    names = [f.name for f in figures]
    for name in (
        "error of 6:1 heads of 16, window 6: dv", "24/8 K=4: speed over plain transformers",
        "12/12 K=2: step over bare forward and backward", "256/16 K=2 with checkpointing: peak",
        "packs of 128: of the card's matrix products", "checkpoint of the adapter: write", "chunks of 16",
    ):  # fmt: skip
        assert name in names


def test_the_command_writes_the_record_and_prints_the_table(
    card: Callable, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """One check by the command line that its process would get; then a deadline at which none is worth its start."""
    gpu, path = card("gpu"), tmp_path / "gpu.json"
    lines = ["--json", str(path), "--tiny"]

    def here(record: Any, checks: Any, command: Any, until: float) -> None:
        reading, writing = os.pipe()
        _python, script, *arguments = command([check.name for check in checks], writing)
        assert (script, until > time.time()) == (gpu.__file__, True)
        gpu.main(arguments)
        with os.fdopen(reading) as events:
            for line in events:
                record.take(json.loads(line))

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "supervise", here)
        assert gpu.main([*lines, "--only", "machine"]) == 0
    (check,) = json.loads(path.read_text())["checks"]
    assert (check["state"], [f["name"] for f in check["figures"]]) == ("done", ["matrix product", "copy"])
    assert f"torch {torch.__version__}" in check["facts"]["versions"]
    assert "0 of 0 goals met; 1 of 1 checks done." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main([*lines, "--only", "trl"])
    assert "'TRL'" in capsys.readouterr().err
    gpu.main([*lines, "--deadline", "4"])
    assert {c["state"] for c in json.loads(path.read_text())["checks"]} == {"left out"}
    assert f"0 of {len(gpu.CHECKS)} checks done." in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["window", "sibling"])
def test_wrong_attention_misses_its_goal(card: Callable, bench: Any, wrong: str, monkeypatch: Any) -> None:
    kernels = card("card.kernels")
    right = kernels.tree_attention

    def changed(module: Any, q: Any, k: Any, v: Any, mask: Any, *, tree_row: Any, **options: Any) -> Any:
        if wrong == "window" and options["sliding_window"]:
            options["sliding_window"] += 1
        if wrong == "sibling":
            first, *rest = tree_row.spans
            (start, a), (_, b), *others = first.completions
            tree_row = kernels.Row((dataclasses.replace(first, completions=((start, a + b), *others)), *rest))
        return right(module, q, k, v, mask, tree_row=tree_row, **options)

    monkeypatch.setattr(kernels, "tree_attention", changed)
    found = [f for f in kernels.attention(bench) if isinstance(f, card("card.record").Figure) and f.goal]
    assert {"window" in f.name for f in found if not f.met} == ({True} if wrong == "window" else {True, False})


@pytest.mark.slow
def test_plain_transformers_has_the_loss_of_the_loop(card: Callable, bench: Any) -> None:
    """What it is measured beside is the same step: equal gradients of the adapter, up to rounding."""
    steps, sizes = card("card.steps"), card("card.sizes")
    case = bench.sizes.cases[1]
    pairs = sizes.rows(case, bench.sizes.small.vocab_size)
    found: list[list[torch.Tensor]] = []
    for plain in (False, True):
        bench.drop()
        model = bench.lora(bench.sizes.small)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        before = [p.detach().clone() for p in trained]
        if plain:
            model.set_rows("separate")
            steps.plain_step(model.policy, pairs, case, 3)()
        else:
            next(steps._steps(model, pairs, bench.sizes.tokens, 1))
        found.append([p.detach() - b for p, b in zip(trained, before, strict=True)])
    # The first step of Adam is the sign of the gradient times the learning rate.
    moved = torch.cat([(a * b > 0).flatten()[a.flatten().abs() > 5e-6] for a, b in zip(*found, strict=True)])
    assert len(moved) > 1000
    assert float(moved.float().mean()) > 0.99


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_has_the_values_of_the_formula(card: Callable, bench: Any, monkeypatch: Any) -> None:
    """Without a gradient: it has none on a CPU."""
    kernels = card("card.kernels")
    monkeypatch.setattr(kernels, "_rules", lambda _sizes: [kernels.Rule(window=6, cap=1.0)])
    bench.sizes = dataclasses.replace(bench.sizes, heads=bench.sizes.heads[1:])
    found = [f for f in kernels.flex(bench) if f.goal]
    assert [f.name for f in found] == ["error of 6:1 heads of 16, window 6, cap 1: output"]
    assert found[0].met


@pytest.mark.slow
def test_trl_beside_us(card: Callable, bench: Any, monkeypatch: Any) -> None:
    """One case: TRL learns on texts that become as many tokens as our rows have."""
    peer = card("card.peer")
    bench.sizes = dataclasses.replace(bench.sizes, cases=bench.sizes.cases[:1])
    found = [f for f in peer.trl(bench) if isinstance(f, card("card.record").Figure)]
    assert [f.goal for f in found if f.goal] == [3.0, 1.5]
    assert all(f.value > 0 for f in found)
    tokenizer, texts = peer._tokenizer(320), peer._texts(bench.sizes.cases[0], 320)
    assert {len(tokenizer(t["prompt"])["input_ids"]) for t in texts} == {12}
    assert {len(tokenizer(t["chosen"])["input_ids"]) for t in texts} == {11}
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(card("card.worker").NotAtHand, match="trl and datasets are not installed"):
        next(peer.trl(bench))


# On a machine with torch, transformers and peft, or needed by none of the checks but TRL's.
AT_HAND = {"torch", "transformers", "peft", "accelerate", "safetensors", "pyarrow", "numpy", "huggingface_hub"}
WITH_THEM = {"typing-extensions", "filelock"}  # torch needs them


def imported(path: Path, seen: set[Path]) -> set[str]:
    """The packages that a module imports when it is imported, and so do the modules of ours among them."""
    seen.add(path)
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first not in ("prefpipe", "card"):
                found.add(first)
                continue
            place = (ROOT if first == "prefpipe" else ROOT / "benchmarks").joinpath(first, *rest)
            for module in (place / "__init__.py", place.with_suffix(".py")):
                if module.is_file() and module not in seen:
                    found |= imported(module, seen)
    return found - set(sys.stdlib_module_names)


def test_it_imports_nothing_but_what_its_list_has() -> None:
    """And the list has what the packages on it need in turn."""
    listed = re.findall(r"^([\w-]+)==", (ROOT / "requirements" / "gpu-check.txt").read_text(), re.MULTILINE)
    seen: set[Path] = set()
    paths = [ROOT / "benchmarks" / "gpu.py", *(ROOT / "benchmarks" / "card").glob("*.py")]
    found = set().union(*(imported(path, seen) for path in paths))
    assert len(seen) > 30
    assert found - AT_HAND - WITH_THEM <= {name.replace("-", "_") for name in listed}
    for name in listed:
        needs = {re.split(r"[^\w-]", need)[0].lower() for need in requires(name) or () if "extra ==" not in need}
        assert needs - WITH_THEM <= set(listed), name


def test_the_list_has_the_versions_of_the_lock() -> None:
    pins = {
        name: dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE))
        for name in ("gpu-check.txt", "cpu.txt")
    }
    assert pins["gpu-check.txt"].items() <= pins["cpu.txt"].items()
