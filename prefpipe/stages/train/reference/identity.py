"""Which model the reference log-probs of the rows belong to, or must come from."""

from dataclasses import dataclass
from typing import Literal

from prefpipe.errors import DataError, IdentityError
from prefpipe.models.policy import Policy

Named = Policy | Literal["unavailable"] | None  # the reference that the settings name


@dataclass(frozen=True)
class Reference:
    """The model whose log-probs the rows hold or are to get."""

    id: str
    # The model to load; None for the initial policy and its base, which training loads anyway.
    model: Policy | None = None
    # Whether its log-probs can be computed here; where they cannot, those of the rows are taken unchecked.
    at_hand: bool = True


def settle_reference(cached_id: str | None, lacking: str | None, policy: Policy, named: Named) -> Reference:
    """The reference of rows whose log-probs are those of `cached_id`; `lacking` says how many rows have none, if any.

    Raises IdentityError when the log-probs are of another model than the one that the settings name, or, where they
    name none, neither of the initial policy nor of its base; DataError when some are missing and no model is at hand to
    compute them.
    """
    loaded_anyway = (policy.id, policy.base_id)
    if isinstance(named, Policy):
        if cached_id not in (None, named.id):
            raise _mismatch(
                str(cached_id),
                f"the reference that is given is {named.id}",
                named.id,
                "pass the --reference-model and --reference-adapter that made them, or make them again: prefpipe score",
            )
        return Reference(named.id, None if named.id in loaded_anyway else named)
    if cached_id in loaded_anyway or (cached_id is None and not (named and lacking)):
        return Reference(cached_id or policy.id)
    if lacking or cached_id is None:
        raise DataError(
            f"{lacking} have no log-probs of their reference {cached_id or 'model'}, which is not the policy that "
            "training starts from",
            "pass it as --reference-model (and --reference-adapter), or fill them first: prefpipe score, whose output "
            "takes the place of these rows",
        )
    if named is None:
        raise _mismatch(
            cached_id,
            f"training starts from {policy.id}",
            policy.id,
            "pass the --model and --adapter that made them, or generate again with this model; if the reference is "
            "meant to be another one, pass it as --reference-model and --reference-adapter",
        )
    return Reference(cached_id, at_hand=False)


def _mismatch(cached_id: str, fact: str, expected_id: str, hint: str) -> IdentityError:
    cached, expected = (set(name.split("+")) for name in (cached_id, expected_id))
    parts = {part.partition(":")[0] for part in cached ^ expected}
    differing = ", ".join(sorted(parts, reverse=True))  # weights before adapter
    return IdentityError(
        f"the cached reference log-probs were made by {cached_id}, but {fact} (different: {differing})", hint
    )
