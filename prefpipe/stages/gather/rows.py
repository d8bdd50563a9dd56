"""Parts of generate or evaluate as one run: a shard has rows of every part, since part I/N is every N-th prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import DataError
from prefpipe.inference import sampling
from prefpipe.inference.cutting import fitting_rows
from prefpipe.inputs import files
from prefpipe.inputs.prompts import Prompts, read_prompts
from prefpipe.rewards import rating
from prefpipe.runs import commits, store
from prefpipe.runs.store import Run
from prefpipe.schemas import Completion, Dropped, Evaluation, Prompt, RefLogps, Reward, arrow_schema
from prefpipe.stages.gather.parts import Part

_TYPES: dict[str, type] = {
    "dropped": Dropped,
    "prompts": Prompt,
    "ref_logps": RefLogps,
    "completions": Completion,
    "evaluations": Evaluation,
}
Config = GenerateConfig | EvaluateConfig
_OF_PROMPTS = ("dropped", "prompts")  # datasets with a row for a prompt; the others have one for a completion


def prompts_of(config: Config) -> Prompts:
    """The prompts of all parts."""
    prompts, _ = read_prompts(config.prompts, config.split, config.limit, files.renames(config.column))
    return prompts


def shard_size(parts: Sequence[Part], prompts: Prompts) -> int:
    """Prompts in a shard: what the parts were told, or what fits their prompts together where each took what fits its
    own."""
    told = {part.saved["config"]["shard_rows"] for part in parts}
    fitting = {fitting_rows(len(prompts.part(part.number, part.count))) for part in parts}
    return told.pop() if len(told) == 1 and told != fitting else fitting_rows(len(prompts))


@dataclass(frozen=True)
class Interleaved:
    """The parts, the prompts of all of them in their order, and the settings of the whole run."""

    parts: Sequence[Part]
    prompts: Prompts
    config: Config

    def place(self, run: Run) -> None:
        """Write and commit every shard of the run that is not there, from the rows of the parts.

        Raises DataError for a damaged file, and for a part whose rows are not those of its prompts.
        """
        datasets, num_samples = _datasets(self.config)
        empty = {name: arrow_schema(_type(name)).empty_table() for name in datasets}
        streams = [_Stream(part, datasets[-1], num_samples, dict(empty)) for part in self.parts]
        for index, shard in enumerate(self._shards()):
            prompts = [prompt for _, prompt in shard]
            of_parts = [[prompt.prompt_id for owner, prompt in shard if owner == i] for i in range(len(streams))]
            taken = [stream.take(ids) for stream, ids in zip(streams, of_parts, strict=True)]
            rows = sampling.rows_of(prompts)
            if not run.has_shard(datasets, index, rows):
                order = [prompt.prompt_id for prompt in prompts]
                whole = _merged(taken, order, datasets[-1], num_samples).items()
                commits.commit(run.new_part(name, _type(name), index, table, rows) for name, table in whole)
        for stream in streams:
            stream.check_end()

    def _shards(self) -> Iterator[list[tuple[int, Prompt]]]:
        """The prompts of every shard, each with the place of its part."""
        places, count = enumerate(self.prompts.places()), len(self.parts)
        while shard := list(islice(places, self.config.shard_rows)):
            yield [(place % count, prompt) for place, prompt in shard if prompt is not None]


@dataclass
class _Stream:
    """The rows of a part in their order, by dataset; some of its shards are in memory at a time. `answers` is the
    dataset with the rows of samples."""

    part: Part
    answers: str
    num_samples: int
    tables: dict[str, pa.Table]
    next_shard: int = 0

    def take(self, prompt_ids: Sequence[str]) -> dict[str, pa.Table]:
        """The rows of the next prompts, by dataset. Raises DataError where the part has others."""
        while self._num_prompts() < len(prompt_ids) and self._has_more():
            self._load()
        lost = {*self.tables["dropped"]["id"].to_pylist()}
        dropped, kept = ([i for i in prompt_ids if (i in lost) == is_lost] for is_lost in (True, False))
        counts = {"dropped": len(dropped), "prompts": len(kept)}
        taken: dict[str, pa.Table] = {}
        for name, table in self.tables.items():
            count = counts.get(name, len(kept) * self.num_samples)
            taken[name], self.tables[name] = table.slice(0, count), table.slice(count)
        of_samples = [prompt_id for prompt_id in kept for _ in range(self.num_samples)]
        completion_ids = taken[self.answers]["completion_id"].to_pylist()
        expected = {
            "dropped": ("id", dropped),
            "prompts": ("prompt_id", kept),
            self.answers: ("prompt_id", of_samples),
        }
        for name, table in taken.items():
            column, values = expected.get(name, ("completion_id", completion_ids))
            if table[column].to_pylist() != values:
                raise self._other_rows()
        return taken

    def check_end(self) -> None:
        """Raise DataError for rows that belong to no prompt."""
        if self._has_more() or any(table.num_rows for table in self.tables.values()):
            raise self._other_rows()

    def _num_prompts(self) -> int:
        return self.tables["dropped"].num_rows + self.tables[self.answers].num_rows // self.num_samples

    def _has_more(self) -> bool:
        return _file(self.answers, self.next_shard) in self.part.manifest["files"]

    def _load(self) -> None:
        """Read the next shard."""
        for name, before in self.tables.items():
            file = _file(name, self.next_shard)
            table = store.read_file(self.part.directory, self.part.manifest, file, _type(name))
            self.tables[name] = pa.concat_tables([before, table])
        self.next_shard += 1

    def _other_rows(self) -> DataError:
        return DataError(
            f"{self.part.directory} has other rows than part {self.part.name} of its prompts", "make that part again"
        )


def _datasets(config: Config) -> tuple[list[str], int]:
    """The datasets whose rows stand in the order of the prompts, that of the samples last; samples of a prompt."""
    if isinstance(config, EvaluateConfig):
        return ["dropped", "evaluations"], config.num_samples + 1  # the greedy one
    logps = ["ref_logps"] if config.reference != "none" else []
    rewards = map(rating.reward_folder, config.rewards)
    return ["dropped", "prompts", *logps, *rewards, "completions"], config.num_samples


def _merged(
    taken: Sequence[dict[str, pa.Table]], order: Sequence[str], answers: str, num_samples: int
) -> dict[str, pa.Table]:
    """The rows of a shard by dataset, in the `order` of its prompts."""
    tables = {name: pa.concat_tables([part[name] for part in taken]) for name in taken[0]}
    lost, answered = tables["dropped"]["id"].to_pylist(), tables[answers]["prompt_id"].to_pylist()[::num_samples]
    dropped, kept = ({prompt_id: row for row, prompt_id in enumerate(ids)} for ids in (lost, answered))
    merged: dict[str, pa.Table] = {}
    for name, table in tables.items():
        rows, width = (dropped if name == "dropped" else kept), (1 if name in _OF_PROMPTS else num_samples)
        indices = [rows[prompt_id] * width + k for prompt_id in order if prompt_id in rows for k in range(width)]
        merged[name] = table.take(pa.array(indices, pa.int64())).combine_chunks()
    return merged


def _file(dataset: str, index: int) -> str:
    return f"{dataset}/part-{index:05d}.parquet"


def _type(dataset: str) -> type:
    return _TYPES.get(dataset, Reward)
