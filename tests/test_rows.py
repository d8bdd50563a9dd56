"""Keys, completions and reference columns of a row of every dataset."""

from dataclasses import replace
from pathlib import Path

import pytest

from prefpipe import rows
from prefpipe.errors import DataError, IdentityError
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.models.chat import Chat
from prefpipe.schemas import Label, Pair, Prompt, RankedGroup, RefLogps
from tests.conftest import Write
from tests.inputs.cases import read_labels, read_pairs

GROUP = RankedGroup(
    "p", [], [1, 2], ["best", "worst"], [[], []], [[3], [4, 5]], ["d", "e"], [1.0, 0.0], ["stop"] * 2, 1.0,
    None, None, None, None,
)  # fmt: skip


def values(name: str, *token_logps: float) -> RefLogps:
    return RefLogps(name, "model", "scorer", "digest", list(token_logps), sum(token_logps), len(token_logps))


@pytest.fixture
def pair(write: Write, chat: Chat) -> Pair:
    ((found,), _) = read_pairs(write({"prompt": "Q", "chosen": "yes", "rejected": "no"}), chat)
    return found


@pytest.fixture
def labels(write: Write, chat: Chat) -> list[Label]:
    return read_labels(write(*({"prompt": f"Q{i}", "completion": "A", "label": True} for i in range(3))), chat)[0]


def test_the_first_column_is_the_key(pair: Pair, labels: list[Label]) -> None:
    (bank_row, *_) = kl_bank(labels, 2, 0)
    assert [rows.key_of(row) for row in (pair, labels[0], GROUP, bank_row)] == [
        pair.pair_id, labels[0].completion_id, "p", bank_row.bank_id,
    ]  # fmt: skip
    assert {name: rows.key_column(row_type) for name, row_type in rows.ROW_TYPES.items()} == {
        "prompts": "prompt_id", "completions": "completion_id", "pairs": "pair_id", "labels": "completion_id",
        "kl_bank": "bank_id", "groups": "prompt_id",
    }  # fmt: skip


def test_the_completions_of_a_row_are_in_its_order(pair: Pair, labels: list[Label]) -> None:
    assert [name for name, *_ in rows.completions_of(pair)] == [pair.chosen_completion_id, pair.rejected_completion_id]
    assert rows.completions_of(GROUP) == [("best", [1, 2], [3], None, "d"), ("worst", [1, 2], [4, 5], None, "e")]
    masked = replace(GROUP, loss_masks=[[True], [False, True]])
    assert [found.loss_mask for found in rows.completions_of(masked)] == [[True], [False, True]]
    ((name, prompt, ids, mask, digest),) = rows.completions_of(labels[0])
    assert (name, prompt) == (labels[0].completion_id, labels[0].prompt_token_ids)
    assert (ids, mask, digest) == (labels[0].token_ids, None, labels[0].ids_digest)
    assert rows.completions_of(Prompt("p", [], None, "train", "", "{}")) == []


def test_reference_columns_are_filled_by_completion_id(pair: Pair, labels: list[Label]) -> None:
    chosen, rejected = pair.chosen_completion_id, pair.rejected_completion_id
    found = rows.with_ref_logps(pair, {chosen: values(chosen, -1.0, -0.5), rejected: values(rejected, -2.0)})
    assert (found.ref_chosen_logps, found.ref_rejected_logps) == (-1.5, -2.0)
    assert (found.ref_chosen_token_logps, found.ref_rejected_token_logps) == ([-1.0, -0.5], [-2.0])
    assert (found.reference, found.scorer) == ("model", "scorer")
    group = rows.with_ref_logps(GROUP, {"best": values("best", -1.0), "worst": values("worst", -2.0, -3.0)})
    assert (group.ref_logps, group.ref_token_logps) == ([-1.0, -5.0], [[-1.0], [-2.0, -3.0]])
    label = rows.with_ref_logps(labels[0], {labels[0].completion_id: values(labels[0].completion_id, -4.0)})
    assert label == replace(labels[0], ref_logps=-4.0, ref_token_logps=[-4.0], reference="model", scorer="scorer")


def test_the_bank_has_values_of_its_own_rows(labels: list[Label]) -> None:
    (row, *_) = kl_bank(labels, 2, 0)
    assert rows.with_ref_logps(row, {row.bank_id: values(row.bank_id, -4.0)}).ref_logps == -4.0


def test_a_row_without_values_stays_as_it_is(pair: Pair, tmp_path: Path) -> None:
    assert rows.with_ref_logps(pair, {}) is pair
    prompt = Prompt("p", [], None, "train", "", "{}")
    assert rows.with_ref_logps(prompt, {"p": values("p", -1.0)}) is prompt


def test_a_row_of_log_probs_has_their_sum_and_number() -> None:
    row = rows.ref_logps("c", "digest", [-1.0, -0.5], reference="model", scorer="scorer")
    assert row == values("c", -1.0, -0.5)
    assert (row.ref_logps, row.num_tokens) == (-1.5, 2)


def test_ids_that_are_not_those_of_the_digest_are_refused(pair: Pair) -> None:
    """Each side by itself; a prompt of another length moves the boundary."""
    rows.check_ids(pair, "runs/p")
    chosen, rejected = (replace(pair, **{f"{side}_token_ids": [9, 2]}) for side in ("chosen", "rejected"))
    longer = replace(pair, prompt_token_ids=[*pair.prompt_token_ids, pair.chosen_token_ids[0]])
    masked = replace(pair, rejected_loss_mask=[False, *[True] * (len(pair.rejected_token_ids) - 1)])
    short = replace(pair, chosen_loss_mask=[True])
    cases = ((chosen, "chosen"), (rejected, "rejected"), (longer, "chosen"), (masked, "rejected"), (short, "chosen"))
    for edited, key in cases:
        completion_id = getattr(pair, f"{key}_completion_id")
        with pytest.raises(IdentityError, match=f"runs/p: the token ids of {completion_id} do not match their digest"):
            rows.check_ids(edited, "runs/p")


def test_log_probs_of_two_references_never_mix() -> None:
    assert rows.one_reference([None, "a", "a"]) == "a"
    assert rows.one_reference([None]) is None
    with pytest.raises(DataError, match="log-probs of 2 references: a, b"):
        rows.one_reference(["b", None, "a"])


def test_log_probs_of_other_ids_name_the_first_completion() -> None:
    error = rows.logps_of_other_ids(["c", "d"], "runs/s")
    expected = "runs/s: the log-probs of 2 completions were made for other token ids (first: completion c)"
    assert error.message.startswith(expected)
