"""The shards that `prefpipe score` writes: their numbers and datasets, which of them are missing, and their totals."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefpipe.config.shared import IMPORTED_REWARD
from prefpipe.errors import DataError
from prefpipe.ids import content_id
from prefpipe.inference.works import Part, part_of
from prefpipe.rewards import rating
from prefpipe.rewards.base import RewardFunction
from prefpipe.rows import ROW_TYPES, Logps, key_column, key_of, what_helps, why_dropped, with_ref_logps
from prefpipe.runs import commits
from prefpipe.runs.manifests import Balance
from prefpipe.runs.resume import ROWS
from prefpipe.runs.store import Run
from prefpipe.schemas import Dropped, Label, RefLogps, Reward, from_table
from prefpipe.stages.score.imports import DESIRABLE, RATING_FOLDER, Known
from prefpipe.stages.score.sources import ENGINE_DIED, InputShard, ShardRows

_KEYED: dict[str, type] = {**ROW_TYPES, RATING_FOLDER: Reward}


_CAME_IN = "input_count"  # in a commit record: pairs, answers and faulty rows of a foreign file
_BEFORE = "input_before"  # in a commit record: the digest of all rows in front of the shard


@dataclass(frozen=True)
class OutputShard:
    """A shard of the run: its number, its datasets in the order in which they are written, how to read its rows, and,
    for its commit records, the digests of its rows and of all in front of them."""

    index: int
    datasets: tuple[str, ...]
    read: Callable[[], ShardRows]
    rows: Mapping[str, str]

    def holding(self, rows: ShardRows) -> "OutputShard":
        """The shard with rows that were read."""
        return replace(self, read=partial(_again, rows))

    @property
    def parts(self) -> list[tuple[str, int]]:
        """(dataset, number) of its files."""
        return [(name, self.index) for name in self.datasets]


def numbered(shards: Iterable[InputShard], reward_names: Iterable[str], *, scored: bool) -> Iterator[OutputShard]:
    """The shards of all inputs as shards of the run, numbered in their order. `scored`: they get log-probs."""
    logps = ("ref_logps",) if scored else ()
    scores = (*logps, *map(rating.reward_folder, reward_names), "dropped")
    before = ""
    for index, shard in enumerate(shards):
        rows = {ROWS: shard.digest, _BEFORE: before}
        yield OutputShard(index, (*shard.datasets, *scores), shard.read, rows)
        before = content_id(before, shard.digest)


def of_part(shards: Iterable[OutputShard], number: int, count: int) -> Iterator[OutputShard]:
    """Every `count`-th shard, from the `number`-th (1 is the first). Shards of files in front of one are read before
    it: which of its rows repeat an earlier one is then the same as in a run of all parts."""
    before: list[OutputShard] = []
    for shard in shards:
        if shard.index % count != number - 1:
            before += [shard] if "completions" in shard.datasets else []
            continue
        for other in before:
            other.read()
        before.clear()
        yield shard


def missing(shards: Iterable[OutputShard], run: Run, known: Known) -> Iterator[OutputShard]:
    """The shards without a commit, or of other rows than the inputs have there now; at the end, shards for which the
    inputs have no rows are set aside. The keys of committed ones are added to `known` on the way, for the next ones.

    Which rows of a shard repeat an earlier one depends on all rows in front of it. Where these changed, a committed
    shard is read again, and stays if it would be written with the same rows.
    """
    parts: set[tuple[str, int]] = set()
    for shard in shards:
        parts.update(shard.parts)
        if not run.has_shard(shard.datasets, shard.index, {ROWS: shard.rows[ROWS]}):
            yield shard
        elif all(commits.record_mismatch(run.part(*part), shard.rows) is None for part in shard.parts):
            if "completions" in shard.datasets:  # of a file: rows of runs have no part in what repeats
                _remember(shard, run, known)
        else:
            rows = shard.read()
            if _is_committed(rows, shard, run):
                for part in shard.parts:
                    commits.amend(run.part(*part), shard.rows)
            else:
                run.has_shard(shard.datasets, shard.index, shard.rows)  # moves it aside
                yield shard.holding(rows)
    run.set_others_aside(parts)


def _again(rows: ShardRows) -> ShardRows:
    return rows


def _is_committed(rows: ShardRows, shard: OutputShard, run: Run) -> bool:
    """Whether a shard was written with the keys and the ledger of these rows, but for rows that killed the engine."""
    dropped = from_table(Dropped, run.read_part("dropped", Dropped, shard.index))
    lost = {row.id for row in dropped if row.reason == ENGINE_DIED}
    if [row for row in dropped if row.reason != ENGINE_DIED] != rows.dropped:
        return False
    for dataset in _KEYED.keys() & {*shard.datasets}:
        written = _keys(run, dataset, shard.index)
        expected = map(key_of, rows.ratings if dataset == RATING_FOLDER else rows.rows[dataset])
        if written != [key for key in expected if key not in lost]:
            return False
    return True


def _remember(shard: OutputShard, run: Run, known: Known) -> None:
    dropped = from_table(Dropped, run.read_part("dropped", Dropped, shard.index))
    lost = [row.id for row in dropped if row.reason == ENGINE_DIED]
    for dataset in _KEYED.keys() & {*shard.datasets}:
        for key in (*_keys(run, dataset, shard.index), *lost):
            known[dataset].add(key)
    if "labels" in shard.datasets:
        labels = run.read_part("labels", Label, shard.index, ["completion_id", "label"])
        for key in labels.filter(labels["label"])["completion_id"].to_pylist():
            known[DESIRABLE].add(key)


def parts(rewards: Mapping[str, RewardFunction], shard: OutputShard, shard_rows: ShardRows, logps: Logps) -> list[Part]:
    """Rate the answers of a shard; its datasets: rows with their log-probs, log-probs, rewards, ledger."""
    tables: dict[str, tuple[type, list[Any]]] = {
        name: (ROW_TYPES[name], [with_ref_logps(row, logps) for row in rows]) for name, rows in shard_rows.rows.items()
    }
    new_logps = [row for completion_id, row in logps.items() if completion_id not in shard_rows.written_before]
    tables["ref_logps"] = (RefLogps, new_logps)
    tables[RATING_FOLDER] = (Reward, shard_rows.ratings)
    for name, function in rewards.items():
        tables[rating.reward_folder(name)] = (Reward, _rate(shard_rows, name, function))
    tables["dropped"] = (Dropped, shard_rows.dropped)
    came_in = {} if shard_rows.came_in is None else {_CAME_IN: str(shard_rows.came_in)}
    return [part_of(name, *tables[name], {**shard.rows, **came_in}) for name in shard.datasets]


def _rate(shard_rows: ShardRows, name: str, function: RewardFunction) -> list[Reward]:
    scores = rating.rate([answer for _, answer in shard_rows.answers], function, name)
    return [
        Reward(completion_id, name, score.reward, score.status, score.detail)
        for (completion_id, _), score in zip(shard_rows.answers, scores, strict=True)
    ]


def balances(run: Run) -> Iterator[Balance]:
    """What became of the pairs, answers and faulty rows of foreign files: each is kept or in the ledger. A shard of one
    of our runs, and one that an older version wrote, says not how many they were."""
    came_in = kept = dropped = 0
    for index, values in commits.recorded_values(run.out, _CAME_IN).items():
        if not all(value is not None and value.isdigit() for value in values):
            continue
        came_in += sum(map(int, filter(None, values)))
        datasets = {name for name in ("pairs", "completions", "labels", RATING_FOLDER) if index in run.parts(name)}
        keys = {name: _keys(run, name, index) for name in datasets}
        kept += len(keys["pairs"] if "pairs" in keys else {key for found in keys.values() for key in found})
        ledger = from_table(Dropped, run.read_part("dropped", Dropped, index))
        # A pair is lost with one of its completions, which has a line as well.
        lost = [row for row in ledger if row.reason == ENGINE_DIED and row.detail.endswith(row.id)]
        dropped += len(ledger) - (len(lost) if "pairs" in keys else 0)
    yield Balance("rows", came_in, kept, dropped)


def _keys(run: Run, dataset: str, index: int) -> list[str]:
    column = key_column(_KEYED[dataset])
    return run.read_part(dataset, _KEYED[dataset], index, [column])[column].to_pylist()


def totals(run: Run, reward_names: Iterable[str], *, may_be_empty: bool) -> dict[str, Any]:
    """Counts over all shards, read column by column: the same whether the run was interrupted or not. Raises DataError
    when no row is left, unless a small share or a part may hold none."""
    rows = {name: _count(run, name, row_type) for name, row_type in ROW_TYPES.items() if name != "prompts"}
    rows["ref_logps"] = _count(run, "ref_logps", RefLogps)
    folders = {name: rating.reward_folder(name) for name in (*reward_names, IMPORTED_REWARD)}
    if (
        not may_be_empty
        and not any(rows.values())
        and not any(_count(run, folder, Reward) for folder in folders.values())
    ):
        shards = [run.read_part("dropped", Dropped, index) for index in run.parts("dropped")]
        dropped = [row for shard in shards for row in from_table(Dropped, shard)]
        hint = what_helps(dropped) or f"see {run.out}/dropped.parquet for every row and its reason"
        raise DataError(f"no row is left: {why_dropped(dropped)}", hint)
    _, logp = _tally(run, "ref_logps", RefLogps, "ref_logps")
    _, tokens = _tally(run, "ref_logps", RefLogps, "num_tokens")
    reasons = Counter(reason for part in column(run, "dropped", Dropped, "reason") for reason in part)
    return {
        "rows": rows,
        "tokens": int(tokens),
        "mean_token_logp": logp / tokens if tokens else None,
        **rating.totals({name: column(run, folder, Reward, "reward") for name, folder in folders.items()}),
        "dropped": dict(sorted(reasons.items())),
    }


def column(run: Run, dataset: str, row_type: type, name: str) -> Iterator[list[Any]]:
    """A column of a dataset of the run, shard by shard."""
    for index in run.parts(dataset):
        yield run.read_part(dataset, row_type, index, [name])[name].to_pylist()


def _count(run: Run, dataset: str, row_type: type) -> int:
    return sum(len(part) for part in column(run, dataset, row_type, key_column(row_type)))


def _tally(run: Run, dataset: str, row_type: type, name: str) -> tuple[int, float]:
    """(number, sum) of the values of a column that are not null. Sums are taken shard by shard: in another order they
    would round otherwise, and the manifest would have another digest."""
    count, total = 0, 0.0
    for part in column(run, dataset, row_type, name):
        values = [value for value in part if value is not None]
        count += len(values)
        total += sum(values)
    return count, total
