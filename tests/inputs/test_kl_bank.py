import random
from dataclasses import replace

import pytest

from prefpipe.errors import DataError
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.schemas import Label

ROW = Label("", "", [], [], True, [], [], "", "stop", None, 1.0, None, None, None, None)


def labels(prompts: int, each: int) -> list[Label]:
    return [
        replace(ROW, completion_id=f"{p}/{c}", prompt_id=str(p), prompt_token_ids=[p, 1], token_ids=[p, c, 2])
        for p in range(prompts)
        for c in range(each)
    ]


SIZES = [(2, 1, 256), (2, 3, 4), (5, 2, 20), (6, 1, 256), (5, 2, 256), (40, 4, 256), (3, 1, 1)]


@pytest.mark.parametrize(("prompts", "each", "size"), SIZES)
def test_no_row_holds_a_prompt_with_its_own_completion(prompts: int, each: int, size: int) -> None:
    rows = labels(prompts, each)
    owner = {row.completion_id: row.prompt_id for row in rows}
    bank = kl_bank(rows, size, seed=0)
    assert all(owner[b.completion_id] != b.prompt_id and b.prompt_token_ids[0] != b.token_ids[0] for b in bank)
    assert len({b.bank_id for b in bank}) == len(bank)
    # every mismatched combination exists when the bank has room for it
    assert len(bank) == min(size, prompts * each * (prompts - 1))


def test_the_order_of_labels_is_no_matter_and_the_seed_is() -> None:
    rows = labels(20, 3)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert kl_bank(rows, 32, seed=0) == kl_bank(shuffled, 32, seed=0)
    assert kl_bank(rows, 32, seed=0) != kl_bank(rows, 32, seed=1)


def test_prompts_and_completions_are_used_evenly() -> None:
    bank = kl_bank(labels(64, 4), 256, seed=0)
    uses = [sum(b.prompt_id == str(p) for b in bank) for p in range(64)]
    assert max(uses) <= 8
    assert min(uses) >= 1
    assert len({b.completion_id for b in bank}) == 256


def test_one_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="two prompts"):
        kl_bank(labels(1, 4), 8, seed=0)
