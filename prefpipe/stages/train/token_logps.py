"""Log-probs of tokens by the id of their completion, as Arrow holds them: 4 bytes each, also on their way to ranks."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from prefpipe.stages.train.examples import TokenLogps


class TokenLogpsById(Mapping[str, TokenLogps]):
    """The columns completion_id and token_logps (nats) of a table, whose ids are distinct."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    def __reduce__(self) -> tuple[type["TokenLogpsById"], tuple[pa.Table]]:
        return TokenLogpsById, (self._table,)

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of every completion in `lists`."""
        return {key: place for place, key in enumerate(self._table["completion_id"].to_pylist())}

    @cached_property
    def lists(self) -> Any:
        """The log-probs of all completions: an array of lists."""
        column = self._table["token_logps"].cast(pa.list_(pa.float32()))
        return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)

    @cached_property
    def digest(self) -> str:
        """The digest of ids and values."""
        hasher = blake2b(digest_size=16)
        for values in (pa.array(self.places), self.lists.flatten(), self.lists.value_lengths()):
            for buffer in values.buffers():
                hasher.update(buffer or b"")
        return hasher.hexdigest()

    def __getitem__(self, completion_id: str) -> TokenLogps:
        return tuple(self.lists[self.places[completion_id]].as_py())

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return self._table.num_rows
