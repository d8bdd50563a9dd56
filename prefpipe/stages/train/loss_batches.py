"""From the log-probs of the tokens of a micro-batch to the batch that its losses read."""

import math
from collections.abc import Sequence
from typing import cast

import torch

from prefpipe.config.losses import LossSettings
from prefpipe.forward.layout import Layout
from prefpipe.forward.logps import completion_logps
from prefpipe.stages.train.examples import TrainCompletion, TrainGroup, TrainLabel, TrainPair
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, LossBatch, PairBatch, RankBatch
from prefpipe.stages.train.micro_batches import MicroBatch


def scores_prompt(settings: LossSettings) -> bool:
    """Whether an NLL term reads the log-probs of the prompt too."""
    return settings.nll_scope == "prompt_response"


def to_loss_batch(
    token_logps: torch.Tensor, layout: Layout, micro: MicroBatch, settings: LossSettings, z0: float = 0.0
) -> tuple[LossBatch, torch.Tensor]:
    """Policy and reference log-probs of the rows of a micro-batch (all of one kind), and the weights of the rows [B].

    `token_logps` [N] are the log-probs of its scored tokens under the policy. With use_weighting they are [2, N]: row 1
    is log sum over the vocabulary of p^2, and the weights of the rows are multiplied by WPO's.
    """
    given = _MicroLogps(token_logps if token_logps.dim() == 1 else token_logps[0], layout, micro, settings)
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


class _MicroLogps:
    """The token log-probs of a micro-batch, as sums over completions or over parts of them."""

    def __init__(self, token_logps: torch.Tensor, layout: Layout, micro: MicroBatch, settings: LossSettings) -> None:
        self.micro, self.settings, self.device = micro, settings, token_logps.device
        self._token_logps = token_logps
        lengths = [count for tree in micro.trees for count in tree.num_scored]
        self._ends = torch.tensor([0, *lengths]).cumsum(0).tolist()[1:]
        self.whole = completion_logps(token_logps, layout)  # [completions]; with the prompt, where it is scored

    def column(self, values: Sequence[float]) -> torch.Tensor:
        """[B], one value per row."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def completions(self, position: int) -> list[TrainCompletion]:
        """The position-th completion of every row."""
        return [row.completions[position] for row in self.micro.rows]

    def side(self, position: int, prefixes: Sequence[int] | None = None) -> Logps:
        """Log-probs of the position-th completion of every row, and of its first `prefixes` scored tokens."""
        completions, numbers = self.completions(position), [place[position] for place in self.micro.places]
        lengths = [completion.num_scored for completion in completions]
        policy = self._sums(numbers, lengths, lengths) if scores_prompt(self.settings) else self.whole[numbers]
        known = all(completion.ref_logps is not None for completion in completions)
        return Logps(
            policy_logps=policy,
            lengths=self.column(lengths),
            reference_logps=self.column([math.fsum(c.ref_logps or ()) for c in completions]) if known else None,
            policy_prefix_logps=None if prefixes is None else self._sums(numbers, lengths, prefixes),
            reference_prefix_logps=None
            if prefixes is None or not known
            else self.column([math.fsum((c.ref_logps or ())[:n]) for c, n in zip(completions, prefixes, strict=True)]),
        )

    def policy_weights(self, log_collisions: torch.Tensor) -> torch.Tensor:
        """WPO's weights, [B], without gradient: min(1, product over both sides of exp(mean over the tokens of
        log p - log sum_v p_v^2)), which is 1 for completions that the policy itself would say. Zhou et al. 2024
        (2406.11827), clamped as in the authors' code."""
        excess = (self._token_logps - log_collisions).detach()
        total = torch.zeros(len(self.micro.rows), device=self.device)
        for position in (0, 1):
            lengths = [completion.num_scored for completion in self.completions(position)]
            numbers = [place[position] for place in self.micro.places]
            total += self._sums(numbers, lengths, lengths, excess) / self.column(lengths)
        return total.exp().clamp(max=1.0)

    def _sums(
        self, numbers: Sequence[int], lengths: Sequence[int], taken: Sequence[int], values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sums [B] over the first `taken` of the last `lengths` scored tokens of completions: of the log-probs, or of
        other `values` of the tokens [N]."""
        starts = [self._ends[n] - length for n, length in zip(numbers, lengths, strict=True)]
        tokens = [i for start, count in zip(starts, taken, strict=True) for i in range(start, start + count)]
        owners = [row for row, count in enumerate(taken) for _ in range(count)]
        sums = torch.zeros(len(numbers), dtype=torch.float32, device=self.device)
        index = torch.tensor([tokens, owners], dtype=torch.long, device=self.device)
        return sums.index_add(0, index[1], (self._token_logps if values is None else values)[index[0]])


def _pairs(given: _MicroLogps, rows: Sequence[TrainPair]) -> PairBatch:
    scored = [[completion.num_scored for completion in row.completions] for row in rows]
    prefixes = None if given.settings.ld_alpha == 1 else list(map(min, scored))
    nll = None
    if scores_prompt(given.settings):
        lengths = given.column([len(r.prompt_ids) - 1 + chosen for r, (chosen, _) in zip(rows, scored, strict=True)])
        nll = Logps(given.whole[[place[0] for place in given.micro.places]], lengths)
    return PairBatch(
        chosen=given.side(0, prefixes),
        rejected=given.side(1, prefixes),
        preference_prob=_optional(given, [r.preference_prob for r in rows]),
        reward_gap=_optional(given, [r.reward_gap for r in rows]),
        nll=nll,
    )


def _groups(given: _MicroLogps) -> RankBatch:
    """[B, K], K = the largest number of completions of a row. A row with fewer repeats its last one, marked as not
    present."""
    places, rows = given.micro.places, given.micro.rows
    most = max(map(len, places))
    numbers = [[*place, *[place[-1]] * (most - len(place))] for place in places]
    completions = [[*row.completions, *[row.completions[-1]] * (most - len(row.completions))] for row in rows]
    known = all(c.ref_logps is not None for row in completions for c in row)

    def table(values: list[list[float]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=given.device)

    logps = Logps(
        policy_logps=given.whole[torch.tensor(numbers, device=given.device)],
        lengths=table([[float(c.num_scored) for c in row] for row in completions]),
        reference_logps=table([[math.fsum(c.ref_logps or ()) for c in row] for row in completions]) if known else None,
    )
    present = torch.arange(most).expand(len(places), most) < torch.tensor([[len(place)] for place in places])
    return RankBatch(logps, present.to(given.device))


def _optional(given: _MicroLogps, values: Sequence[float | None]) -> torch.Tensor | None:
    """A column of the data [B], or None where a row has no value."""
    return None if any(v is None for v in values) else given.column([v or 0.0 for v in values])
