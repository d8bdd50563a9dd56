"""Which model the reference log-probs of the rows belong to, or must come from."""

from dataclasses import dataclass
from typing import Literal

from prefpipe.errors import DataError, IdentityError
from prefpipe.models.policy import Policy


@dataclass(frozen=True)
class Reference:
    """Whose log-probs the rows hold or are to get. `model` makes and checks them where it is neither the initial policy
    nor its base; without `at_hand` nobody here can, and the values are taken as they are."""

    id: str
    model: Policy | None = None
    at_hand: bool = True


def settle_reference(
    cached: str | None, lacking: str | None, policy: Policy, given: Policy | Literal["unavailable"] | None
) -> Reference:
    """The reference of rows whose values are named `cached`; `lacking` says how many rows have none, if any.

    Raises IdentityError when the values are of another model than the one that is `given`, or, without one, neither of
    the initial policy nor of its base; DataError when values are missing and their model is not at hand.
    """
    own = (policy.id, policy.base_id)
    if isinstance(given, Policy):
        if cached not in (None, given.id):
            raise _mismatch(
                str(cached),
                f"the reference that is given is {given.id}",
                given.id,
                "pass the --reference-model and --reference-adapter that made them, or make them again: prefpipe score",
            )
        return Reference(given.id, None if given.id in own else given)
    if cached in own or (cached is None and not (given and lacking)):
        return Reference(cached or policy.id)
    if lacking or cached is None:
        raise DataError(
            f"{lacking} have no log-probs of their reference {cached or 'model'}, which is not the policy that "
            "training starts from",
            "pass it as --reference-model (and --reference-adapter), or fill them first: prefpipe score, whose output "
            "takes the place of these rows",
        )
    if given is None:
        raise _mismatch(
            cached,
            f"training starts from {policy.id}",
            policy.id,
            "pass the --model and --adapter that made them, or generate again with this model; if the reference is "
            "meant to be another one, pass it as --reference-model and --reference-adapter",
        )
    return Reference(cached, at_hand=False)


def _mismatch(cached: str, fact: str, ours: str, hint: str) -> IdentityError:
    theirs, own = (name.split("+") for name in (cached, ours))
    parts = {part.partition(":")[0] for part in {*theirs} ^ {*own}}
    differing = ", ".join(sorted(parts, reverse=True))  # weights before adapter
    return IdentityError(
        f"the cached reference log-probs were made by {cached}, but {fact} (different: {differing})", hint
    )
