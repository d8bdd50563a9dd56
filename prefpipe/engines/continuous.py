"""Completions sampled in one batch that stays full: as one ends, the next begins in its slot, whatever their lengths.

A prompt is computed once. Its keys and values go to the slots of all its completions; one that finds no slot at first
takes them later from a sibling, whose slot still begins with the prompt.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch

from prefpipe.engines.base import EngineSettings, Request
from prefpipe.engines.drawing import Completion, extend
from prefpipe.forward.cached import CachedModel


class Batch:
    """The completions under way; number b is in slot b of the model's cache.

    `fits` says whether a request may be sampled here. The first one that may not ends the batch, and is `left`.
    """

    def __init__(self, policy: torch.nn.Module, settings: EngineSettings, fits: Callable[[Request], bool]) -> None:
        self.left: list[Request] = []
        self._model = CachedModel(policy)
        self._settings = settings
        self._fits = fits
        self._slots: list[Completion] = []
        self._waiting: deque[Completion] = deque()
        self._open: dict[str, list[Completion]] = {}  # all completions of a request, by its prompt_id
        self._behind: dict[str, torch.Tensor] = {}  # logits behind a prompt for which completions wait
        self._done: list[Request] = []

    def sample(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        """Each request with its completions when all of them have ended."""
        while True:
            self._fill(requests)
            if self._slots:
                tokens = [c.token_ids[-1] for c in self._slots]
                positions = [len(c.request.prompt_token_ids) + len(c.token_ids) - 1 for c in self._slots]
                self._extend(self._slots, self._model.step(tokens, positions))
            elif not self._done:
                return
            while self._done:
                request = self._done.pop()
                yield request, self._open.pop(request.prompt_id)

    def _fill(self, requests: Iterator[Request]) -> None:
        """Let completions begin in all free slots, as long as there are some; then close the gaps."""
        while new := self._place(requests):
            fresh: dict[str, list[int]] = {}
            for slot in new:
                request = self._slots[slot].request
                if request.prompt_id not in self._behind:
                    fresh.setdefault(request.prompt_id, []).append(slot)
            for some in self._packed(fresh):
                prompts = [self._slots[fresh[key][0]].request.prompt_token_ids for key in some]
                logits = self._model.prompts(prompts, [fresh[key] for key in some])
                self._behind.update(zip(some, logits, strict=True))
            begun = [self._slots[slot] for slot in new]
            self._extend(begun, torch.stack([self._behind[c.request.prompt_id] for c in begun]))
            waiting = {c.request.prompt_id for c in self._waiting}
            self._behind = {key: row for key, row in self._behind.items() if key in waiting}
        self._close_gaps()

    def _place(self, requests: Iterator[Request]) -> list[int]:
        """Put waiting completions into free slots; returns their slots. Behind a prompt that is computed already, its
        keys and values are copied."""
        new: list[int] = []
        most = self._settings.max_num_seqs
        for slot in range(most):
            if slot < len(self._slots) and not self._slots[slot].finish_reason:
                continue
            if not self._waiting:
                self._take(requests)
            if not self._waiting:
                break
            completion = self._waiting.popleft()
            if completion.request.prompt_id in self._behind:
                sibling = next(s for s, c in enumerate(self._slots) if c.request is completion.request)
                if sibling != slot:
                    self._model.copy(sibling, slot, len(completion.request.prompt_token_ids))
            self._slots[slot : slot + 1] = [completion]
            new.append(slot)
        return new

    def _take(self, requests: Iterator[Request]) -> None:
        """The next request's completions begin to wait."""
        request = None if self.left else next(requests, None)
        if request is None:
            return
        if not self._fits(request):
            self.left.append(request)
            return
        completions = [Completion(request, draw) for draw in request.draws]
        self._open[request.prompt_id] = completions
        self._waiting.extend(completions)

    def _packed(self, fresh: dict[str, list[int]]) -> Iterator[list[str]]:
        """The prompts to compute, as many in one pass as its budget of tokens holds."""
        some: list[str] = []
        tokens = 0
        for key, slots in fresh.items():
            length = len(self._slots[slots[0]].request.prompt_token_ids)
            if some and tokens + length > self._settings.max_tokens_per_batch:
                yield some
                some, tokens = [], 0
            some.append(key)
            tokens += length
        if some:
            yield some

    def _extend(self, completions: list[Completion], logits: torch.Tensor) -> None:
        extend(completions, logits, self._settings)
        ended = {c.request.prompt_id: c.request for c in completions if c.finish_reason}
        self._done += [r for key, r in ended.items() if all(c.finish_reason for c in self._open[key])]

    def _close_gaps(self) -> None:
        """The last completions move into slots that stay free."""
        slot = 0
        while slot < len(self._slots):
            if not self._slots[slot].finish_reason:
                slot += 1
                continue
            last = self._slots.pop()
            if slot < len(self._slots) and not last.finish_reason:
                self._model.copy(len(self._slots), slot, len(last.request.prompt_token_ids) + len(last.token_ids) - 1)
                self._slots[slot] = last
