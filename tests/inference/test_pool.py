"""Several workers write what one process writes, whoever dies in between; a prompt that kills is convicted."""

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefpipe import engines
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.score import ScoreConfig
from prefpipe.engines.fake import FakeEngine
from prefpipe.errors import DataError, IdentityError, PrefpipeError
from prefpipe.inference import pool, pool_driver, pool_worker, warm
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.pool_messages import Gone, Noted
from prefpipe.inference.works import Finished
from prefpipe.runs import store
from prefpipe.schemas import Completion, RefLogps
from prefpipe.stages.evaluate import stage as evaluate
from prefpipe.stages.generate import stage as generate
from prefpipe.stages.score import stage as score
from tests.faults.engines import poisoned
from tests.inference.birds import contents
from tests.inference.threads import Dies, Killed, Threads, first_to_say
from tests.waiting import PATIENCE_S

NUM_PROMPTS, SHARD_ROWS = 14, 2


def vanishes(settings: Any) -> Any:
    """The fake engine, until a prompt about poison takes its worker along."""

    def die() -> None:
        raise Killed

    return poisoned(settings, die)


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> GenerateConfig:
    prompts = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    texts = [f"Tell me about bird {i}." for i in range(NUM_PROMPTS - 2)] + ["say <|im_end|>", "Tell me about moss."]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return GenerateConfig(
        model=str(tiny_model),
        prompts=str(prompts),
        engine="fake",
        rewards=("short_sentence",),
        num_samples=2,
        shard_rows=SHARD_ROWS,
        check=3,
    )


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Workers as threads; returns the backends that runs have started."""
    started: list[Threads] = []

    def call(dies: Dies = lambda _life, _number: False, **options: Any) -> list[Threads]:
        def backend(_environments: object) -> Threads:
            started.append(Threads(dies, **options))
            return started[-1]

        monkeypatch.setattr(pool, "Processes", backend)
        return started

    yield call
    for thread in (t for backend in started for t in backend.threads):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()  # nothing is left running


def made(config: GenerateConfig, out: Path, workers: int) -> dict[str, bytes]:
    """The files of a run."""
    generate.run(config.model_copy(update={"workers": workers}), out, force=False)
    return contents(out)


@pytest.fixture(scope="module")
def expected(config: GenerateConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return made(config, tmp_path_factory.mktemp("inline") / "g", 1)


@pytest.mark.parametrize("workers", [2, 8])
def test_any_number_of_workers_writes_the_same_bytes(
    config: GenerateConfig, expected: dict[str, bytes], use: Any, tmp_path: Path, workers: int
) -> None:
    started = use()
    assert made(config, tmp_path / "g", workers) == expected
    assert started[0].lives == workers


@pytest.mark.slow
def test_workers_with_a_model_sample_the_same_rows_up_to_rounding(config: GenerateConfig, tmp_path: Path) -> None:
    """In processes: transformers changes torch while it reads a model, and must not do so in two threads.

    Batches differ from one number of workers to the next: log-probs may differ in their last digits, and where two
    tokens are as likely, so may a token.
    """
    real = config.model_copy(update={"engine": "transformers", "dtype": "float32", "max_tokens": 8, "check": 0})
    tables: list[dict[str, tuple[list[int], list[float]]]] = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        made(real, out, workers)
        completions = store.read_dataset(out, "completions", Completion).to_pylist()
        logps = store.read_dataset(out, "ref_logps", RefLogps).to_pylist()
        pairs = zip(completions, logps, strict=True)
        tables.append({c["completion_id"]: (c["token_ids"], row["token_logps"]) for c, row in pairs})
    one, two = tables
    assert list(one) == list(two)
    alike = [key for key in one if one[key][0] == two[key][0]]
    assert len(alike) >= 0.9 * len(one)
    for key in alike:
        assert two[key][1] == pytest.approx(one[key][1], abs=1e-4)


def test_a_worker_says_what_enters_at_once_and_what_has_left_with_its_progress() -> None:
    """Two messages for a request: the one that kills its engine is on record before the engine has it."""
    said: list[Any] = []
    voice = pool_worker.Voice(said.append)
    voice.advance(0)  # a shard without a prompt that is left out
    voice.note("take a")
    assert said == [Noted(("take a",), 0)]
    voice.note("done a")
    assert len(said) == 1
    voice.advance(1)
    voice.note("alone b")
    voice.note("done b")
    voice.note("died")
    assert said[1:] == [Noted(("done a",), 1), Noted(("alone b",), 0), Noted(("done b", "died"), 0)]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("count", [0, 1, 16, 17, 40])
def test_shards_that_are_whole_at_the_same_time_are_committed_together(count: int, fails: bool) -> None:
    """16 at most, in their order; and all of them before the error of a worker."""
    shards = [Finished(index, (), 1) for index in range(count)]

    def heard() -> Iterator[Finished | None]:
        for shard in shards:
            yield from (None, shard)
        if fails:
            raise PrefpipeError("a worker ended", "")

    groups: list[list[Finished]] = []
    with pytest.raises(PrefpipeError) if fails else nullcontext():
        for group in pool_driver._together(heard()):
            groups.append(group)  # noqa: PERF402  (an error comes in the middle)
    assert [len(group) for group in groups] == [16] * (count // 16) + [count % 16] * (count % 16 > 0)
    assert [shard for group in groups for shard in group] == shards


def rows_of(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", ["evaluate", "score", "rate"])
def test_the_other_commands_write_the_same_bytes_with_workers(
    config: GenerateConfig, use: Any, tmp_path: Path, command: str
) -> None:
    """Guards, log-probs of a text, completions that repeat in another shard; a worker dies in
    each."""
    pairs = [{"prompt": f"Bird {i}?", "chosen": f"Owl {i}.", "rejected": f"No {i}."} for i in range(7)]
    pairs.append({**pairs[0], "chosen": "An owl."})
    text = tmp_path / "text.txt"
    text.write_text("Birds fly. " * 20)
    common = {"model": config.model, "engine": "fake", "shard_rows": 2}
    sampled = {**common, "prompts": config.prompts, "split": "all", "max_tokens": 20, "num_samples": 1}
    beside = {"guard": (f"{config.prompts}:length",), "guard_split": "all", "perplexity_text": str(text)}
    source = {"inputs": (str(rows_of(tmp_path / "pairs.jsonl", pairs)),), "rewards": ("short_sentence",)}
    module, made_of = {
        "evaluate": (
            evaluate,
            EvaluateConfig(
                **sampled,
                **beside,
                reward=("short_sentence",),
            ),
        ),
        "score": (score, ScoreConfig(**common, **source, check=3)),
        "rate": (score, ScoreConfig(**common, **source, reference="none")),
    }[command]
    started = use(first_to_say(3))
    for workers, name in ((1, "one"), (3, "three")):
        module.run(made_of.model_copy(update={"workers": workers}), tmp_path / name, force=False)
    assert started[0].lives == 4
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@settings(deadline=None, max_examples=8, suppress_health_check=[*HealthCheck])
@given(st.integers(2, 4), st.dictionaries(st.integers(1, 5), st.integers(3, 40), max_size=4), st.booleans())
def test_workers_that_die_cost_nothing_but_time(
    config: GenerateConfig,
    expected: dict[str, bytes],
    use: Any,
    tmp_path_factory: pytest.TempPathFactory,
    workers: int,
    ends: dict[int, int],
    blameless: bool,
) -> None:
    """Up to four of them, each somewhere in its work."""
    use(lambda life, number: ends.get(life) == number, blameless=blameless)
    assert made(config, tmp_path_factory.mktemp("killed") / "g", workers) == expected


def test_a_run_goes_on_with_another_number_of_workers(
    config: GenerateConfig, expected: dict[str, bytes], use: Any, tmp_path: Path
) -> None:
    """The first command ends because workers die that have done nothing yet, one after the other."""
    use(lambda life, number: number > (12 if life <= 3 else 2))
    with pytest.raises(PrefpipeError, match=r"worker \d ended \(SIGKILL\)"):
        made(config, tmp_path / "g", 3)
    written = list((tmp_path / "g" / "completions").glob("*.ok.json"))
    assert 0 < len(written) < NUM_PROMPTS // SHARD_ROWS
    stamps = {path: path.stat().st_mtime_ns for path in written}
    assert made(config, tmp_path / "g", 1) == expected
    assert {path: path.stat().st_mtime_ns for path in written} == stamps  # nothing is made twice


@pytest.mark.parametrize(
    ("engine", "deaths"), [("tests.inference.test_pool:vanishes", 3), ("tests.faults.engines:raises", 2)]
)
def test_a_prompt_that_kills_workers_is_convicted_and_the_run_ends_well(
    config: GenerateConfig, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, deaths: int
) -> None:
    """Killed among others, then alone: twice where the process vanishes, once where the engine says that it failed."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(Path(config.prompts).read_text() + json.dumps({"prompt": "Tell me about poison."}) + "\n")
    monkeypatch.setitem(engines.ENGINES, "fake", engine)
    started = use()
    made(config.model_copy(update={"prompts": str(prompts)}), tmp_path / "g", 2)
    reasons = [row["reason"] for row in pq.read_table(tmp_path / "g" / "dropped.parquet").to_pylist()]
    assert sorted(reasons) == ["control_tokens", "engine_died"]
    assert started[0].lives == 2 + deaths
    assert len(Inflight.load(tmp_path / "g").killers) == 1  # on record: it never runs again in this directory


def test_an_engine_may_hold_more_than_two_shards(
    config: GenerateConfig, expected: dict[str, bytes], use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes requests until it is full before the first of them leaves."""
    monkeypatch.setitem(engines.ENGINES, "fake", f"{__name__}:large")
    use()
    assert made(config, tmp_path / "g", 2) == expected


def large(settings: Any) -> Any:
    """The fake engine with room for more prompts than the run has."""
    engine = poisoned(settings, lambda: None)
    engine.in_flight = NUM_PROMPTS + 1
    return engine


def test_the_death_of_a_machine_charges_nobody(
    config: GenerateConfig, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers end while prompts are inside; the log of the run names no suspect."""
    seen: list[list[str]] = []
    plain = Inflight.close
    monkeypatch.setattr(Inflight, "close", lambda self: (seen.append([*self.suspects, *self.killers]), plain(self))[1])
    started = use(first_to_say(7, deaths=2), blameless=True)  # before it says that a prompt has left its engine
    made(config, tmp_path / "g", 2)
    assert started[0].lives == 4
    assert seen == [[]]


def test_a_worker_with_other_weights_is_refused(
    config: GenerateConfig, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_model: Path
) -> None:
    plain = pool_worker.resolve
    monkeypatch.setattr(pool_worker, "resolve", lambda _model, adapter: plain(str(other_model), adapter))
    use()
    with pytest.raises(IdentityError, match="is another model where a worker runs"):
        made(config, tmp_path / "g", 2)


def test_workers_that_compute_with_different_things_are_refused(
    config: GenerateConfig, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other packages than in the process of the command."""
    for versions in ({"torch": "0.1"}, {"prefpipe": "0.0.1"}):
        monkeypatch.setattr(pool_worker, "versions", lambda found=versions: found)
        use()
        with pytest.raises(IdentityError, match=r"a worker has \w+ 0\.\d"):
            made(config, tmp_path / "g", 2)


def test_workers_with_different_scorers_are_refused(
    config: GenerateConfig, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines.ENGINES, "fake", f"{__name__}:named")
    use()
    with pytest.raises(IdentityError, match="a worker has scorer"):
        made(config, tmp_path / "g", 2)
    REFUSED.set()


NAMES, REFUSED = count(), threading.Event()


def named(settings: Any) -> Any:
    """An engine with a name that no other has, which samples when the test is over."""
    engine = large(settings)
    engine.scorer = f"scorer {next(NAMES)}"
    engine.sample = lambda _request: REFUSED.wait(PATIENCE_S)
    return engine


def test_a_worker_that_does_not_come_up_is_an_error_in_time(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(Threads):
        start_s = 0.2

        def start(self, number: int) -> None:
            self._inboxes[number] = queue.SimpleQueue()

    monkeypatch.setattr(pool, "Processes", lambda _environments: Silent())
    monkeypatch.setattr(pool_driver, "_TICK_S", 0.1)
    with pytest.raises(PrefpipeError, match=r"worker 0: it does not start after 0 s"):
        made(config, tmp_path / "g", 2)


def broken(completions: list[str], **_: Any) -> list[float]:
    raise RuntimeError(f"no reward for {len(completions)}")


def test_an_error_of_a_worker_is_the_error_of_the_command(config: GenerateConfig, use: Any, tmp_path: Path) -> None:
    use()
    wrong = config.model_copy(update={"rewards": (f"{__name__}:broken",)})
    with pytest.raises(DataError, match=r"failed on all 4 completions: .*no reward for 4"):
        made(wrong, tmp_path / "g", 2)


@pytest.mark.parametrize(("takes", "starts"), [(True, 1), (False, 2)])
def test_workers_go_on_in_the_next_step_with_its_adapter(
    config: GenerateConfig,
    expected: dict[str, bytes],
    use: Any,
    tmp_path: Path,
    tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    takes: bool,
    starts: int,
) -> None:
    """Also in a step that asks for fewer; a death is a death in either step. Without `takes`, engines refuse."""
    policies: list[str] = []
    monkeypatch.setattr(FakeEngine, "take", lambda _, policy: (policies.append(policy.id), takes)[1])
    started = use(first_to_say(12))
    with warm.shelf(lora_rank=4) as shelf:
        shelf.keep = True
        assert made(config, tmp_path / "base", 3) == expected
        assert made(config, tmp_path / "again", 2) == expected
        assert not policies
        made(config.model_copy(update={"adapter": str(tiny_adapter)}), tmp_path / "adapted", 2)
    assert len(started) == starts
    assert set(policies) == {store.read_manifest(tmp_path / "adapted")["identity"]["policy"]}


def test_workers_of_which_one_died_between_two_steps_start_anew(
    config: GenerateConfig, expected: dict[str, bytes], use: Any, tmp_path: Path, tiny_adapter: Path
) -> None:
    started = use()
    with warm.shelf(lora_rank=4) as shelf:
        shelf.keep = True
        assert made(config, tmp_path / "base", 2) == expected
        started[0].say(1, Gone("SIGKILL"))
        made(config.model_copy(update={"adapter": str(tiny_adapter)}), tmp_path / "adapted", 2)
    assert len(started) == 2
