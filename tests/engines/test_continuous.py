"""A batch that stays full: who gets a slot when, and that no completion notices."""

from collections.abc import Sequence
from typing import cast

import pytest
import torch

from prefpipe.engines import continuous
from prefpipe.engines.base import Draw, EngineSettings, Request
from prefpipe.engines.continuous import Batch

VOCABULARY, STOP, MOST = 16, 2, 12


class Rows:
    """In place of a model with its cache: slots hold token ids, and what follows a row depends on all of them."""

    def __init__(self, _policy: object) -> None:
        self.slots: dict[int, list[int]] = {}
        self.computed: list[list[int]] = []
        self.sizes: list[int] = []

    def prompts(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> torch.Tensor:
        for prompt, places in zip(prompts, slots, strict=True):
            self.computed.append(list(prompt))
            self.slots |= {slot: list(prompt) for slot in places}
        return torch.stack([behind(prompt) for prompt in prompts])

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        self.sizes.append(len(tokens))
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self.slots[slot][position:] = [token]
        return torch.stack([behind(self.slots[slot]) for slot in range(len(tokens))])

    def copy(self, source: int, target: int, length: int) -> None:
        self.slots[target] = self.slots[source][:length]


def behind(ids: Sequence[int]) -> torch.Tensor:
    """Logits that a wrong token anywhere before changes; some rows end at their first token."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)) * 2
    logits[STOP] += 1
    return logits


def settings(most: int) -> EngineSettings:
    class Stops:
        eos_token_ids = frozenset({STOP})

    return EngineSettings(None, Stops(), "float32", 1.0, MOST, 64, most, 64, max_tokens_per_batch=16)  # type: ignore[arg-type]


Found = dict[str, list[tuple[int, list[int], str]]]


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "CachedModel", Rows)


def sampled(most: int) -> tuple[Found, Rows]:
    """All completions through a batch of `most` slots, and the stand-in for the model behind them."""
    batch = Batch(torch.nn.Module(), settings(most), lambda _request: True)
    found = {
        request.prompt_id: [(c.draw.sample_index, c.token_ids, c.finish_reason) for c in completions]
        for request, completions in batch.sample(iter(requests()))
    }
    return found, cast(Rows, batch._model)


def requests() -> list[Request]:
    return [
        Request(f"p{n}", [3 + n] * (1 + n % 7), tuple(Draw(k, 100 * n + k, k % 3 / 2) for k in range(5)))
        for n in range(9)
    ]


def test_a_completion_is_the_same_in_a_batch_of_any_size() -> None:
    """One slot, fewer slots than draws of a prompt, and room for all at once."""
    alone, _ = sampled(1)
    assert {len(ids) for rows in alone.values() for _, ids, _ in rows} >= {1, 2, 3, MOST}
    assert {reason for rows in alone.values() for *_, reason in rows} == {"stop", "length"}
    for most in (3, 8, 100):
        assert sampled(most)[0] == alone


@pytest.mark.parametrize("most", [1, 3, 8, 100])
def test_a_prompt_is_computed_once_however_its_draws_come_in(most: int) -> None:
    _, model = sampled(most)
    assert sorted(model.computed) == sorted(r.prompt_token_ids for r in requests())


def test_the_batch_stays_full_while_completions_wait() -> None:
    """All eight slots are taken until the last completion has begun, which ends within MOST steps."""
    _, model = sampled(8)
    last = max(n for n, size in enumerate(model.sizes) if size == 8)
    assert set(model.sizes[: last + 1]) == {8}
    assert len(model.sizes) - last - 1 <= MOST


def test_a_request_that_does_not_fit_ends_the_batch_and_is_left() -> None:
    """The seventh prompt has seven tokens, more than the six that fit: those before it are sampled to their end."""
    source = iter(requests())
    batch = Batch(torch.nn.Module(), settings(100), lambda request: len(request.prompt_token_ids) <= 6)
    assert {request.prompt_id for request, _ in batch.sample(source)} == {f"p{n}" for n in range(6)}
    assert [r.prompt_id for r in (*batch.left, *source)] == ["p6", "p7", "p8"]


def test_requests_are_taken_as_slots_get_free() -> None:
    """Five slots hold completions of at most five requests, and those of one more may wait."""
    source = iter(requests())
    batch = Batch(torch.nn.Module(), settings(5), lambda _request: True)
    for ended, _ in enumerate(batch.sample(source), 1):
        taken = len(requests()) - source.__length_hint__()
        assert taken - ended <= 6
