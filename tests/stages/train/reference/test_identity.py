"""Which reference the values of the rows belong to, for every way in which a user can name one."""

from pathlib import Path
from typing import Literal

import pytest

from prefpipe.errors import DataError, IdentityError
from prefpipe.models.policy import Policy
from prefpipe.stages.train.reference.identity import Reference, settle_reference

POLICY = Policy(Path("m"), Path("b"), "a", "b")
BASE = Policy(Path("m"), None, "a", None)
OTHER = Policy(Path("c"), None, "c", None)


@pytest.mark.parametrize(
    ("cached", "lacking", "given", "expected"),
    [
        (None, "3 of 3 rows", None, Reference(POLICY.id)),  # missing values are made by the initial policy
        (POLICY.id, None, None, Reference(POLICY.id)),
        (BASE.id, "1 of 3 rows", None, Reference(BASE.id)),  # its adapter is off while the base is scored
        (None, "3 of 3 rows", BASE, Reference(BASE.id)),  # no second model: it is the policy without its adapter
        (OTHER.id, None, OTHER, Reference(OTHER.id, OTHER)),
        (None, "3 of 3 rows", OTHER, Reference(OTHER.id, OTHER)),
        (OTHER.id, None, "unavailable", Reference(OTHER.id, at_hand=False)),
        (POLICY.id, None, "unavailable", Reference(POLICY.id)),  # it is at hand all the same, and checked
    ],
)
def test_a_reference_is_settled(
    cached: str | None, lacking: str | None, given: Policy | Literal["unavailable"] | None, expected: Reference
) -> None:
    assert settle_reference(cached, lacking, POLICY, given) == expected


def test_values_of_another_model_name_what_differs() -> None:
    with pytest.raises(IdentityError, match=r"made by weights:c, but training starts from .*\(different: weights, ada"):
        settle_reference(OTHER.id, None, POLICY, None)
    with pytest.raises(IdentityError, match=r"the reference that is given is weights:c .*\(different: weights\)"):
        settle_reference(BASE.id, None, POLICY, OTHER)


def test_missing_values_of_a_model_that_is_not_at_hand_name_score() -> None:
    for given in (None, "unavailable"):
        with pytest.raises(DataError, match="1 of 3 rows have no log-probs of their reference weights:c") as error:
            settle_reference(OTHER.id, "1 of 3 rows", POLICY, given)
        assert "prefpipe score" in error.value.hint
