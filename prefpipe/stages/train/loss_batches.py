"""From the token log-probs of a micro-batch to what its losses read."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import cast

import torch

from prefpipe.config.train import TrainConfig
from prefpipe.forward.layout import Layout
from prefpipe.forward.logps import completion_logps
from prefpipe.stages.train.examples import TrainCompletion, TrainGroup, TrainLabel, TrainPair
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, LossBatch, LossSettings, PairBatch, RankBatch
from prefpipe.stages.train.micro_batches import MicroBatch


def settings_of(config: TrainConfig) -> LossSettings:
    """The numbers that losses read."""
    return LossSettings(**{f.name: getattr(config, f.name) for f in fields(LossSettings)})


def scores_prompt(config: TrainConfig) -> bool:
    """Whether an NLL term needs the log-probs of the prompt too."""
    return config.nll_scope == "prompt_response"


def to_loss_batch(
    token_logps: torch.Tensor, layout: Layout, micro: MicroBatch, config: TrainConfig, z0: float = 0.0
) -> tuple[LossBatch, torch.Tensor]:
    """Policy and reference log-probs of a micro-batch's rows (all of one kind), and the rows' weights [B].

    `token_logps` are [N], or [2, N] with log sum p^2 below: the weights are then WPO's too.
    """
    given = _Given(token_logps if token_logps.dim() == 1 else token_logps[0], layout, micro, config)
    if isinstance(micro.rows[0], TrainPair):
        batch = _pairs(given, cast("Sequence[TrainPair]", micro.rows))
    elif isinstance(micro.rows[0], TrainGroup):
        batch = _groups(given)
    else:
        labels = [bool(row.desirable) for row in cast("Sequence[TrainLabel]", micro.rows)]
        desirable = torch.tensor(labels, device=given.device)
        batch = LabelBatch(given.side(0), desirable, torch.tensor(z0, device=given.device))
    weights = given.column([row.weight for row in micro.rows])
    return batch, weights if token_logps.dim() == 1 else weights * given.policy_weights(token_logps[1])


class _Given:
    """The log-probs of a micro-batch, cut into the sums that are asked for."""

    def __init__(self, token_logps: torch.Tensor, layout: Layout, micro: MicroBatch, config: TrainConfig) -> None:
        self.micro, self.config, self.device = micro, config, token_logps.device
        self._token_logps = token_logps
        lengths = [len(ids) for tree in micro.trees for ids in tree.completions]
        self._ends = torch.tensor([0, *lengths]).cumsum(0).tolist()[1:]
        self.whole = completion_logps(token_logps, layout)  # with the prompt, where it is scored

    def column(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def completions(self, position: int) -> list[TrainCompletion]:
        return [row.completions[position] for row in self.micro.rows]

    def side(self, position: int, prefixes: Sequence[int] | None = None) -> Logps:
        """The position-th completion of every row, with the sums of its first `prefixes` tokens where given."""
        answers, numbers = self.completions(position), [place[position] for place in self.micro.places]
        lengths = [len(completion.token_ids) for completion in answers]
        policy = self._sums(numbers, lengths, lengths) if scores_prompt(self.config) else self.whole[numbers]
        known = all(completion.ref_logps is not None for completion in answers)
        return Logps(
            policy=policy,
            lengths=self.column(lengths),
            reference=self.column([math.fsum(a.ref_logps or ()) for a in answers]) if known else None,
            policy_prefix=None if prefixes is None else self._sums(numbers, lengths, prefixes),
            reference_prefix=None
            if prefixes is None or not known
            else self.column([math.fsum((a.ref_logps or ())[:n]) for a, n in zip(answers, prefixes, strict=True)]),
        )

    def policy_weights(self, log_collisions: torch.Tensor) -> torch.Tensor:
        """[B], without gradient: min(1, product over both sides of exp(mean over tokens of log p - log sum_v p_v^2)),
        1 for what the policy would say itself. Zhou et al. 2024 (WPO, 2406.11827), clamped as in the authors' code."""
        excess = (self._token_logps - log_collisions).detach()
        total = torch.zeros(len(self.micro.rows), device=self.device)
        for position in (0, 1):
            lengths = [len(completion.token_ids) for completion in self.completions(position)]
            numbers = [place[position] for place in self.micro.places]
            total += self._sums(numbers, lengths, lengths, excess) / self.column(lengths)
        return total.exp().clamp(max=1.0)

    def _sums(
        self, numbers: Sequence[int], lengths: Sequence[int], taken: Sequence[int], values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-probs (or other `values` of the tokens) [B] of the first `taken` of the last `lengths` tokens of
        completions."""
        starts = [self._ends[n] - length for n, length in zip(numbers, lengths, strict=True)]
        tokens = [i for start, count in zip(starts, taken, strict=True) for i in range(start, start + count)]
        owners = [row for row, count in enumerate(taken) for _ in range(count)]
        sums = torch.zeros(len(numbers), dtype=torch.float32, device=self.device)
        index = torch.tensor([tokens, owners], dtype=torch.long, device=self.device)
        return sums.index_add(0, index[1], (self._token_logps if values is None else values)[index[0]])


def _pairs(given: _Given, rows: Sequence[TrainPair]) -> PairBatch:
    prefixes = None if given.config.ld_alpha == 1 else [min(len(r.chosen), len(r.rejected)) for r in rows]
    nll = None
    if scores_prompt(given.config):
        lengths = given.column([len(r.prompt_ids) - 1 + len(r.chosen) for r in rows])
        nll = Logps(given.whole[[place[0] for place in given.micro.places]], lengths)
    return PairBatch(
        chosen=given.side(0, prefixes),
        rejected=given.side(1, prefixes),
        preference_prob=_optional(given, [r.preference_prob for r in rows]),
        reward_gap=_optional(given, [r.reward_gap for r in rows]),
        nll=nll,
    )


def _groups(given: _Given) -> RankBatch:
    """[B, K] with K the largest number of completions; what a row lacks repeats its last one and is not present."""
    places, rows = given.micro.places, given.micro.rows
    most = max(map(len, places))
    numbers = [[*own, *[own[-1]] * (most - len(own))] for own in places]
    answers = [[*row.completions, *[row.completions[-1]] * (most - len(row.completions))] for row in rows]
    known = all(a.ref_logps is not None for row in answers for a in row)

    def table(values: list[list[float]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=given.device)

    logps = Logps(
        policy=given.whole[torch.tensor(numbers, device=given.device)],
        lengths=table([[float(len(a.token_ids)) for a in row] for row in answers]),
        reference=table([[math.fsum(a.ref_logps or ()) for a in row] for row in answers]) if known else None,
    )
    present = torch.arange(most).expand(len(places), most) < torch.tensor([[len(own)] for own in places])
    return RankBatch(logps, present.to(given.device))


def _optional(given: _Given, values: Sequence[float | None]) -> torch.Tensor | None:
    return None if any(v is None for v in values) else given.column([v or 0.0 for v in values])
