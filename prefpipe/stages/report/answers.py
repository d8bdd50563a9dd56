"""What does it say now? Answers before and after training word by word, pairs at the ends of the scale, samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefpipe.runs import overview
from prefpipe.runs.overview import Overview
from prefpipe.schemas import Evaluation, Pair, Prompt, Reward
from prefpipe.stages.report import texts
from prefpipe.stages.report.charts import is_number
from prefpipe.stages.report.data import completion_rows, reward_names
from prefpipe.stages.report.subject import Subject, label, margins, number
from prefpipe.stages.report.texts import Span, conversation, shown

BUDGET = 900_000  # characters of texts on the page
_MOST_PROMPTS = 300
_MOST_PAIRS = 8  # of each kind
_MOST_ROWS = 5_000
_MOST_SAMPLES = 40
_COLUMNS = ("pair_id", "prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "reward_gap",
            "ref_chosen_logps", "ref_rejected_logps")  # fmt: skip
_Margins = Mapping[str, Mapping[str, Any]]  # the row of the dataset `margins` by the id of its pair
Change = Literal["better", "worse", "same"]


@dataclass(frozen=True)
class Said:
    """An answer: whose it is, its words, its reward."""

    who: str
    spans: Sequence[Span]
    reward: str


@dataclass(frozen=True)
class Asked:
    """A prompt with the answers to it, oldest first, and what became of their reward."""

    prompt: str
    answers: Sequence[Said]
    change: Change


@dataclass(frozen=True)
class Shown:
    """A pair: both sides with their rewards, and its gap, margin and reference margin in one line."""

    prompt: str
    chosen: Said
    rejected: Said
    measures: str


@dataclass(frozen=True)
class Group:
    """Pairs at one end of the scale."""

    title: str
    note: str
    pairs: Sequence[Shown]


@dataclass(frozen=True)
class Answers:
    """Section 4 of the page; `note` says what was left out."""

    asked: Sequence[Asked]
    groups: Sequence[Group]
    samples: Sequence[Asked]
    note: str


def answers(subject: Subject) -> Answers:
    """Section 4, from the first rows of evaluations, pairs and completions, inside the budget of the page."""
    evaluated = [run for run in subject.of("evaluate") if run.has("evaluations")]
    asked, total = _asked(evaluated[0], evaluated[-1]) if evaluated else ([], 0)
    built = [run for run in subject.of("build-pairs", "score") if run.has("pairs")]
    learnt = {row["row_id"]: row for run in subject.of("train")[-1:] for row in margins(run)}
    groups = [*_by_margin(built, learnt), *_others(built[-1], learnt)] if built else []
    sampled = [run for run in subject.of("generate", "score") if run.has("completions")]
    samples = _samples(sampled[-1]) if sampled and not (evaluated or built) else []
    kept = _within(asked, BUDGET)
    left_out = f"{number(len(kept))} of {number(total)} prompts are shown." if len(kept) < total else ""
    cut = f"Texts end after {number(texts.LONGEST)} characters."
    return Answers(kept, groups, samples, " ".join(filter(None, (left_out, cut))))


def _asked(first: Overview, last: Overview) -> tuple[list[Asked], int]:
    """The greedy answers of the first and the last policy to the same prompts, and the number of prompts."""
    before, after = (_greedy(run) for run in (first, last))
    found: list[Asked] = []
    for prompt_id, row in list(after.items())[:_MOST_PROMPTS]:
        old = before.get(prompt_id) if first is not last else None
        answers, change = _compared(label(first), old, label(last), row)
        found.append(Asked(conversation(row["messages"]), answers, change))
    return found, len(after)


def _compared(
    before: str, old: Mapping[str, Any] | None, after: str, new: Mapping[str, Any]
) -> tuple[list[Said], Change]:
    if old is None:
        return [Said(after, [Span("same", shown(new["text"]))], number(new["reward"]))], "same"
    left, right = texts.difference(shown(old["text"]), shown(new["text"]))
    said = [Said(before, left, number(old["reward"])), Said(after, right, number(new["reward"]))]
    if not (is_number(old["reward"]) and is_number(new["reward"])):
        return said, "same"
    rise = new["reward"] - old["reward"]
    return said, "better" if rise > 0 else "worse" if rise < 0 else "same"


def _greedy(run: Overview) -> dict[str, dict[str, Any]]:
    columns = ["prompt_id", "decoding", "messages", "text", "reward"]
    rows = overview.rows(run, "evaluations", Evaluation, _MOST_ROWS, columns).rows
    return {row["prompt_id"]: row for row in rows if row["decoding"] == "greedy"}


def _others(run: Overview, learnt: _Margins) -> list[Group]:
    """The pairs with the largest and the smallest gap, and those that the reference has most the wrong way round."""
    rows = overview.rows(run, "pairs", Pair, _MOST_ROWS, _COLUMNS)
    rated = sorted((row for row in rows.rows if is_number(row["reward_gap"])), key=lambda row: row["reward_gap"])
    margin_of = [
        (margin, place) for place, row in enumerate(rows.rows) if (margin := _reference_margin(row)) is not None
    ]
    known = [rows.rows[place] for _, place in sorted(margin_of)]
    of_all = f" Of the first {number(len(rows.rows))} pairs." if len(rows.rows) < rows.total else ""
    wanted = (
        ("Largest gap", "The clearest lessons of the reward.", rated[::-1]),
        ("Smallest gap", "Nearly a tie: is chosen the better one?", rated),
        ("Most against the reference", "The reference finds rejected far likelier: the hardest lessons.", known),
        *(() if rated or known else (("Pairs", "The first ones; they have no rewards.", rows.rows),)),
    )
    return [_group(title, note + of_all, of, learnt) for title, note, of in wanted if of]


def _by_margin(runs: Sequence[Overview], learnt: _Margins) -> list[Group]:
    """The pairs with the largest, the smallest and the most negative margin of the policy, wherever they were built."""
    ordered = sorted(learnt, key=lambda key: learnt[key]["margin"])
    near = sorted(learnt, key=lambda key: abs(learnt[key]["margin"]))
    against = [key for key in ordered if learnt[key]["margin"] < 0]
    wanted = (
        ("Largest margin", "What the policy has learnt best.", ordered[::-1][:_MOST_PAIRS]),
        ("Smallest margin", "The policy is undecided: little is learnt, or nearly a tie.", near[:_MOST_PAIRS]),
        ("Most negative margin", "The policy prefers rejected: not learnt, or a wrong label?", against[:_MOST_PAIRS]),
    )
    ids = {key for _, _, keys in wanted for key in keys}
    found = {
        row["pair_id"]: row for run in runs for row in overview.rows(run, "pairs", Pair, len(ids), _COLUMNS, ids).rows
    }
    groups = ((title, note, [found[key] for key in keys if key in found]) for title, note, keys in wanted)
    return [_group(title, note, of, learnt) for title, note, of in groups if of]


def _group(title: str, note: str, rows: Sequence[Mapping[str, Any]], learnt: _Margins) -> Group:
    return Group(title, note, [_pair(row, learnt.get(row["pair_id"])) for row in rows[:_MOST_PAIRS]])


def _reference_margin(row: Mapping[str, Any]) -> float | None:
    """Log-prob of chosen minus that of rejected under the reference, in nats."""
    chosen, rejected = row["ref_chosen_logps"], row["ref_rejected_logps"]
    return None if chosen is None or rejected is None else chosen - rejected


def _pair(row: Mapping[str, Any], learnt: Mapping[str, Any] | None) -> Shown:
    chosen, rejected = conversation(row["chosen"]), conversation(row["rejected"])
    left, right = texts.difference(chosen, rejected)
    measures = [f"reference margin {number(_reference_margin(row))} nats", f"reward gap {number(row['reward_gap'])}"]
    if learnt is not None:
        measures.append(f"margin {number(learnt['margin'])}{' (held out)' if learnt['held_out'] else ''}")
    return Shown(
        conversation(row["prompt"]),
        Said("chosen", left, number(row["chosen_reward"])),
        Said("rejected", right, number(row["rejected_reward"])),
        " · ".join(reversed(measures)),
    )


def _samples(run: Overview) -> list[Asked]:
    """The first completions of a run, by prompt, with its first reward."""
    names = reward_names(run)
    rated = overview.rows(run, f"rewards/{names[0]}", Reward, _MOST_ROWS).rows if names else []
    rewards = {row["completion_id"]: row["reward"] for row in rated}
    by_prompt: dict[str, list[Said]] = {}
    for row in completion_rows(run, 4 * _MOST_SAMPLES).rows:
        spans = [Span("same", shown(row["text"]))]
        said = Said(f"sample {row['sample_index']}", spans, number(rewards.get(row["completion_id"])))
        by_prompt.setdefault(row["prompt_id"], []).append(said)
    prompts = prompt_texts(run, list(by_prompt))
    return [Asked(prompts.get(key, key), said, "same") for key, said in list(by_prompt.items())[:_MOST_SAMPLES]]


def prompt_texts(run: Overview, prompt_ids: Sequence[str]) -> dict[str, str]:
    """The texts of prompts of a run of generate, by id; those that the run does not hold are left out."""
    wanted = set(prompt_ids)
    rows = overview.rows(run, "prompts", Prompt, _MOST_ROWS, ["prompt_id", "messages"]).rows
    return {row["prompt_id"]: conversation(row["messages"]) for row in rows if row["prompt_id"] in wanted}


def _within(asked: Sequence[Asked], budget: int) -> list[Asked]:
    """The first prompts whose texts fit into a budget of characters."""
    kept: list[Asked] = []
    spent = 0
    for one in asked:
        spent += len(one.prompt) + sum(len(span.text) for said in one.answers for span in said.spans)
        if spent > budget:
            break
        kept.append(one)
    return kept
