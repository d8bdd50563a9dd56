"""What the answers of a policy are like: pass rates, length, truncation, repetition, diversity, refusals.

A group is what one prompt got in one decoding, as numbers: texts are not kept.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe.rewards.text_rules import distinct_ngrams, refusal_phrase
from prefpipe.schemas import Evaluation
from prefpipe.stages.evaluate import statistics
from prefpipe.stages.evaluate.statistics import Estimate

DECODINGS = ("greedy", "sampled")
_REPEATED_NGRAM = 4
_DISTINCT = (1, 2)
_MOST_PROMPTS = 2  # with one text; more have a policy that stopped reading


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer as numbers. `text` is a hash of it; characters are those of the answer and of its reasoning."""

    reward: float | None
    text: int
    words: int
    tokens: int
    characters: int
    thinking: int
    repetition: float
    truncated: bool
    refuses: bool
    degenerate: bool


@dataclass(frozen=True)
class Group:
    """The answers to one prompt in one decoding. distinct: for each n, how many different n-grams they have together,
    and how many in all."""

    prompt_id: str
    decoding: str
    answers: list[Answered]
    distinct: list[tuple[int, int]]


def measure(rows: Iterable[Evaluation]) -> list[Group]:
    """The groups of some answers; those to one prompt are all among them."""
    by_prompt: dict[tuple[str, str], list[Evaluation]] = defaultdict(list)
    for row in rows:
        by_prompt[row.prompt_id, row.decoding].append(row)
    return [
        Group(prompt_id, decoding, [_answered(row) for row in group], [_distinct(group, n) for n in _DISTINCT])
        for (prompt_id, decoding), group in by_prompt.items()
    ]


def summarize(groups: Sequence[Group], pass_reward: float) -> dict[str, Any]:
    """The numbers of greedy and of sampled answers, each with its 95 % interval.

    The interval of the pass rate: Wilson for greedy answers (one to each prompt), a bootstrap over prompts for sampled
    ones, since the answers to one prompt are not independent. NAME_low and NAME_high belong to any other NAME.
    """
    result: dict[str, Any] = {"prompts": len({group.prompt_id for group in groups})}
    for decoding in DECODINGS:
        chosen = [group for group in groups if group.decoding == decoding]
        if chosen:
            result[decoding] = _pass_rate(chosen, pass_reward) | _numbers(chosen)
    return result


def passes(reward: float | None, pass_reward: float) -> bool:
    """Whether an answer passes; one without a reward does not."""
    return reward is not None and reward >= pass_reward


def mean_reward(rewards: Iterable[Sequence[float | None]]) -> Estimate:
    """The mean of the rewards of every prompt; those without a value are left out, and without any it is 0."""
    rated = [[r for r in group if r is not None] for group in rewards]
    rated = [group for group in rated if group]
    return statistics.mean(rated) if rated else Estimate(0.0, 0.0, 0.0)


def is_degenerate(text: str, finish_reason: str) -> bool:
    """Whether an answer has under three words, was cut at max_tokens, or says the same three words three times."""
    words = text.split()
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    loops = bool(trigrams) and max(trigrams.values()) >= 3
    return len(words) < 3 or finish_reason == "length" or loops


def _answered(row: Evaluation) -> Answered:
    distinct, total = distinct_ngrams(row.text, _REPEATED_NGRAM)
    return Answered(
        reward=row.reward,
        text=hash(row.text.strip()),
        words=len(row.text.split()),
        tokens=len(row.token_ids),
        characters=len(row.text) + len(row.thinking or ""),
        thinking=len(row.thinking or ""),
        repetition=1 - distinct / total if total else 0.0,
        truncated=row.finish_reason == "length",
        refuses=refusal_phrase(row.text) is not None,
        degenerate=is_degenerate(row.text, row.finish_reason),
    )


def _distinct(rows: Sequence[Evaluation], n: int) -> tuple[int, int]:
    """Different n-grams of the texts together, and n-grams in all."""
    texts = [row.text.lower().split() for row in rows]
    ngrams = [ngram for words in texts for ngram in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(ngrams)), len(ngrams)


def _pass_rate(groups: Sequence[Group], pass_reward: float) -> dict[str, Any]:
    passed = [[passes(answer.reward, pass_reward) for answer in group.answers] for group in groups]
    greedy = groups[0].decoding == "greedy"
    low, high = statistics.wilson([p for (p,) in passed]) if greedy else statistics.bootstrap(passed)
    total = sum(map(len, passed))
    found: dict[str, Any] = {"answers": total, "pass": sum(map(sum, passed)) / total, "low": low, "high": high}
    fewest = min(map(len, passed))
    for k in () if greedy else sorted({k for k in (1, 2, 4, 8, 16, 32, 64, fewest) if k <= fewest}):
        rates = [statistics.pass_at_k(sum(p), len(p), k) for p in passed]
        found |= statistics.share([[rate] for rate in rates]).named(f"pass_at_{k}")
    return found


def _numbers(groups: Sequence[Group]) -> dict[str, float]:
    """Every number but the pass rate, with the ends of its interval."""
    prompts_of: dict[int, set[str]] = defaultdict(set)
    for group in groups:
        for answer in group.answers:
            prompts_of[answer.text].add(group.prompt_id)
    repeated = {text for text, prompts in prompts_of.items() if len(prompts) > _MOST_PROMPTS}
    answers = [group.answers for group in groups]
    estimates = {
        "mean_reward": mean_reward([[a.reward for a in group] for group in answers]),
        "mean_words": statistics.mean([[a.words for a in group] for group in answers]),
        "mean_tokens": statistics.mean([[a.tokens for a in group] for group in answers]),
        "degenerate": statistics.share([[a.degenerate or a.text in repeated for a in group] for group in answers]),
        "truncated": statistics.share([[a.truncated for a in group] for group in answers]),
        "refusals": statistics.share([[a.refuses for a in group] for group in answers]),
        "repetition": statistics.mean([[a.repetition for a in group] for group in answers]),
        "thinking": _part([([a.thinking for a in g], [a.characters for a in g]) for g in answers]),
    }
    for place, n in enumerate(_DISTINCT):
        estimates[f"distinct_{n}"] = _part([([g.distinct[place][0]], [g.distinct[place][1]]) for g in groups])
    return {key: value for name, estimate in estimates.items() for key, value in estimate.named(name).items()}


def _part(parts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Estimate:
    """The share that parts have of wholes; 0 where there is nothing to have a share of."""
    sums, counts = [sum(part) for part, _ in parts], [sum(whole) for _, whole in parts]
    return statistics.ratio(sums, counts) if sum(counts) else Estimate(0.0, 0.0, 0.0)
