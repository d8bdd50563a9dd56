"""Foreign files in shards: a row that repeats an earlier one of the run is found, wherever the shards are cut."""

import json
import tracemalloc
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.score import ScoreConfig
from prefpipe.ids import IdSet, content_id
from prefpipe.inputs import tokenised
from prefpipe.inputs.files import ForeignRow
from prefpipe.inputs.tokenised import Limits
from prefpipe.models.chat import Chat
from prefpipe.runs import store, tables
from prefpipe.runs.store import Manifest
from prefpipe.schemas import Completion, Dropped, Label, Pair, Prompt, RefLogps, Reward, from_table
from prefpipe.stages import build_pairs
from prefpipe.stages.score import imports
from prefpipe.stages.score import stage as score
from prefpipe.stages.score.imports import Imported, Known

DATASETS: dict[str, type] = {
    "prompts": Prompt, "completions": Completion, "pairs": Pair, "labels": Label, "ref_logps": RefLogps,
    "rewards/rating": Reward, "rewards/short_sentence": Reward,
}  # fmt: skip
TEXTS = ("Yes.", "No.", "Perhaps.")
# Files of every format with repeated prompts, answers, pairs, labels and ratings, within a file and between files.
FILES: dict[str, list[dict[str, Any]]] = {
    "preference": [
        {"prompt": "A?", "chosen": "Yes.", "rejected": "No.", "id": 1},
        {"prompt": "A?", "chosen": "Yes.", "rejected": "Perhaps.", "id": 2},  # shares an answer
        {"prompt": "B?", "chosen": "Yes.", "rejected": "No.", "id": 3},
        {"prompt": "A?", "chosen": "Yes.", "rejected": "No.", "id": 4},  # repeats the first
        {"prompt": "A?", "chosen": "No.", "rejected": "Yes.", "id": 5},  # the other way round
    ],
    "label": [
        {"prompt": "A?", "completion": "Yes.", "label": True},
        {"prompt": "C?", "completion": "Yes.", "label": True},
        {"prompt": "C?", "completion": "Yes.", "label": False},  # contradicts the one before
        {"prompt": "A?", "completion": "Yes.", "label": True},
    ],
    "list": [
        {"prompt": "A?", "completions": ["Yes.", "Yes.", "Never."], "ratings": [3, 9, 1]},
        {"prompt": "A?", "completions": ["Never.", "Now."], "ratings": [7, 2]},
        {"prompt": "D?", "completions": ["Yes.", "No."], "ratings": [None, 2]},
        {"prompt": "D?", "completions": ["Yes."], "ratings": [5]},
    ],
}


def known() -> Known:
    return defaultdict(IdSet)


def placed(rows: Sequence[dict[str, Any]]) -> list[ForeignRow]:
    return [(f"line {number}", row) for number, row in enumerate(rows, start=1)]


def imported(rows: list[ForeignRow], kind: str, chat: Chat, size: int) -> list[Imported]:
    so_far = known()
    return [
        imports.import_rows(rows[start : start + size], kind, chat, Limits(), so_far, rated=kind == "list")
        for start in range(0, len(rows), size)
    ]


def union(shards: list[Imported]) -> dict[str, list[Any]]:
    names = [f.name for f in fields(Imported) if f.name not in ("used", "prompt_of")]
    return {name: list(chain.from_iterable(getattr(s, name) for s in shards)) for name in names}


def some_rows(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    text, prompt = st.sampled_from(TEXTS), st.sampled_from(("A?", "B?"))
    if kind == "preference":
        return st.fixed_dictionaries({"prompt": prompt, "chosen": text, "rejected": text, "id": st.integers(0, 3)})
    if kind == "label":
        return st.fixed_dictionaries({"prompt": prompt, "completion": text, "label": st.booleans()})
    rated = st.lists(st.tuples(text, st.none() | st.integers(0, 9)), min_size=1, max_size=3)
    return st.tuples(prompt, rated).map(
        lambda r: {"prompt": r[0], "completions": [t for t, _ in r[1]], "ratings": [n for _, n in r[1]]}
    )


@pytest.mark.parametrize("kind", ["preference", "label", "list"])
@settings(deadline=None, max_examples=40)
@given(data=st.data(), size=st.integers(1, 6))
def test_the_rows_are_the_same_wherever_shards_are_cut(chat: Chat, kind: str, data: st.DataObject, size: int) -> None:
    """One shard of everything is the standard; every key stands once, and nothing a shard needs is missing."""
    rows = placed(data.draw(st.lists(some_rows(kind), min_size=1, max_size=8)))
    shards = imported(rows, kind, chat, size)
    found = union(shards)
    assert found == union(imported(rows, kind, chat, len(rows)))
    for name, key in (("prompts", "prompt_id"), ("completions", "completion_id"), ("pairs", "pair_id")):
        keys = [getattr(row, key) for row in found[name]]
        assert len(keys) == len(set(keys))
    for shard in shards:
        sides = {i for p in shard.pairs for i in (p.chosen_completion_id, p.rejected_completion_id)}
        own = {c.completion_id for c in shard.completions}
        assert set(shard.used) == own | sides | {row.completion_id for row in shard.labels}
        assert set(shard.prompt_of) >= own


def test_answers_of_several_pairs_are_one_completion_and_a_repeated_pair_has_a_reason(chat: Chat) -> None:
    """Worked out by hand, a row to a shard: (answers new in it, pairs, reasons)."""
    shards = imported(placed(FILES["preference"]), "preference", chat, 1)
    assert [([c.text for c in s.completions], len(s.pairs), [(d.id, d.reason) for d in s.dropped]) for s in shards] == [
        (["Yes.", "No."], 1, []), (["Perhaps."], 1, []), (["Yes.", "No."], 1, []), ([], 0, [("line 4", "duplicate")]),
        ([], 1, []),
    ]  # fmt: skip
    assert [p.meta for s in shards for p in s.prompts] == ['{"id": 1}', '{"id": 3}']
    assert [len(s.used) for s in shards] == [2, 2, 2, 0, 2]


def test_a_further_rating_or_label_of_a_known_answer_is_no_repetition(chat: Chat) -> None:
    """The pairs come first: of the rated answers "Yes." is known, but not its rating; of its two ratings one counts."""
    so_far = known()
    for kind, expected in (("preference", (5, 0, 0, 1)), ("label", (1, 2, 0, 2)), ("list", (4, 0, 5, 3))):
        rows = placed(FILES[kind])
        made = imports.import_rows(rows, kind, chat, Limits(), so_far, rated=kind == "list")
        assert (len(made.completions), len(made.labels), len(made.ratings), len(made.dropped)) == expected, kind
    assert [(r.reward, r.status) for r in made.ratings] == [
        (3.0, "ok"), (1.0, "ok"), (2.0, "ok"), (None, "unparsable"), (2.0, "ok"),
    ]  # fmt: skip
    assert [d.detail for d in made.dropped] == [
        "line 1 repeats an earlier row", "line 2 repeats an earlier row", "line 4 repeats an earlier row"
    ]  # fmt: skip


def test_an_answer_is_rated_with_the_columns_of_its_own_row(chat: Chat) -> None:
    (made,) = imported(placed(FILES["preference"]), "preference", chat, 9)
    assert [made.prompt_of[c.completion_id].meta for c in made.completions] == [
        '{"id": 1}', '{"id": 1}', '{"id": 2}', '{"id": 3}', '{"id": 3}'
    ]  # fmt: skip


def test_missing_ratings_of_a_file_without_ratings_are_not_known(chat: Chat) -> None:
    so_far, rows = known(), placed([{"prompt": "A?", "completions": ["Yes."]}])
    assert imports.import_rows(rows, "list", chat, Limits(), so_far, rated=False).ratings == []
    later = placed([{"prompt": "A?", "completions": ["Yes."], "ratings": [4]}])
    assert [r.reward for r in imports.import_rows(later, "list", chat, Limits(), so_far, rated=True).ratings] == [4.0]


def test_what_is_known_of_a_row_is_small() -> None:
    """A pair with a prompt and two answers of its own has four keys."""
    tracemalloc.start()
    so_far = known()
    for i in range(3000):
        for dataset, key in (("prompts", "p"), ("completions", "c"), ("completions", "r"), ("pairs", "x")):
            so_far[dataset].add(content_id(key, i))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 200 * 3000


# What follows is the same as `prefpipe score` does it: shards are committed, runs are interrupted, inputs are several.


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("files")
    for kind, rows in FILES.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuple(str(folder / f"{kind}.jsonl") for kind in FILES)


def run(model: Path, sources: Sequence[str], out: Path, size: int) -> Manifest:
    config = ScoreConfig(
        model=str(model), inputs=tuple(sources), engine="fake", check=2, shard_rows=size, rewards=("short_sentence",)
    )
    return score.run(config, out, force=False)


def rows_of(out: Path) -> dict[str, list[Any]]:
    ledger = from_table(Dropped, tables.read_parquet(out / "dropped.parquet"))
    return {name: from_table(t, store.read_dataset(out, name, t)) for name, t in DATASETS.items()} | {"dropped": ledger}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, sources: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard to a file."""
    out = tmp_path_factory.mktemp("whole") / "s"
    run(tiny_model, sources, out, 99)
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_run_over_several_files_has_the_same_rows_for_every_size_of_shards(
    tiny_model: Path, sources: tuple[str, ...], whole: Path, tmp_path: Path, size: int
) -> None:
    manifest = run(tiny_model, sources, tmp_path / "s", size)
    found = rows_of(tmp_path / "s")
    assert found == rows_of(whole)
    assert manifest["totals"] == store.read_manifest(whole)["totals"]
    for dataset in DATASETS:
        keys = [next(iter(vars(row).values())) for row in found[dataset]]
        assert len(keys) == len(set(keys)), dataset
    completions = {c.completion_id for c in found["completions"]}
    assert {i for p in found["pairs"] for i in (p.chosen_completion_id, p.rejected_completion_id)} <= completions
    assert {row.completion_id for row in found["labels"]} <= completions
    assert {row.completion_id for row in found["ref_logps"]} == completions
    assert all(p.ref_chosen_logps is not None and p.ref_rejected_logps is not None for p in found["pairs"])
    assert all(row.ref_logps is not None for row in found["labels"])


@pytest.mark.parametrize("lost", [(0,), (1, 4), (3, 5, 6), (2, 3, 4, 5, 6)])
def test_shards_made_again_have_the_same_bytes_and_only_they_are_tokenised(
    tiny_model: Path, sources: tuple[str, ...], tmp_path: Path, lost: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven shards of one or two rows; whichever are missing, earlier and later ones being there."""
    out = tmp_path / "s"
    manifest = run(tiny_model, sources, out, 2)
    before = {name: (out / name).read_bytes() for name in manifest["files"]}
    (out / "manifest.json").unlink()
    for index in lost:
        (out / "completions" / f"part-{index:05d}.ok.json").unlink()
    calls: list[Any] = []
    plain = tokenised.tokenise
    monkeypatch.setattr(tokenised, "tokenise", lambda *args: calls.append(args) or plain(*args))
    assert run(tiny_model, sources, out, 2) == manifest
    assert {name: (out / name).read_bytes() for name in manifest["files"]} == before
    assert len(calls) == sum([2, 2, 1, 2, 2, 2, 2][index] for index in lost)


def test_build_pairs_and_score_take_a_run_whose_answers_came_up_again(
    tiny_model: Path, sources: tuple[str, ...], tmp_path: Path
) -> None:
    """A prompt stands in the shard where it came first; later answers to it find it there."""
    run(tiny_model, sources, tmp_path / "s", 1)
    run(tiny_model, [str(tmp_path / "s")], tmp_path / "again", 1)
    rewards = [store.read_dataset(tmp_path / n, "rewards/short_sentence", Reward).to_pylist() for n in ("s", "again")]
    assert rewards[0] == rewards[1]
    pairing = BuildPairsConfig(completions=(str(tmp_path / "s"),), reward="rating")
    build_pairs.run(pairing, tmp_path / "p", force=False)
    pairs = from_table(Pair, store.read_dataset(tmp_path / "p", "pairs", Pair))
    assert [(p.prompt[0]["content"], p.chosen_reward, p.rejected_reward) for p in pairs] == [("A?", 3.0, 1.0)]
