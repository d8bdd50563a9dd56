"""Pair rules by name: ours, and functions of users as `module:function`, whose pairs are checked."""

from collections.abc import Iterator
from functools import partial

import polars as pl

from prefpipe import user_functions
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.names import is_function
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.stages.build_pairs import pair_rules
from prefpipe.stages.build_pairs.pair_rules import Ranked, Rule

_SIDES = ("chosen", "rejected")
_CONTRACT = "a rule takes (ranked, config) and returns positions in ranked.flat: docs/pair-rules.md#your-own"


def find(name: str) -> Rule:
    """The rule of that name. One of a user raises UsageError when it fails, and for a pair that is none: positions
    outside of the frame, completions of two prompts, a chosen one without a higher reward, a pair that is there twice.
    """
    return partial(_checked, name) if is_function(name) else pair_rules.find(name)


def inputs(config: BuildPairsConfig) -> dict[str, str]:
    """What identifies a rule of a user in the fingerprint of a run. Raises UsageError or MissingInputError where there
    is no such function, and where other processes would not find it."""
    if config.output == "groups" or not is_function(config.rule):
        return {}
    user_functions.find(config.rule, "pair rule", elsewhere=config.workers > 1 or bool(config.cluster))
    return {f"rule {config.rule}": user_functions.digest(config.rule, "pair rule")}


def _checked(name: str, ranked: Ranked, config: BuildPairsConfig) -> pl.DataFrame:
    rule = user_functions.find(name, "pair rule")
    try:
        with user_functions.never_ends():
            found = rule(ranked, config)
    except (*user_functions.STOPS, UsageError, MissingInputError):
        raise
    except BaseException as error:  # of the user's code, which may even call sys.exit; a panic of polars is one
        raise _refused(name, f"it failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, pl.DataFrame) or not {*_SIDES} <= {*found.columns}:
        raise _refused(name, "it returned no polars frame with the columns chosen and rejected")
    pairs = found.select(_SIDES)
    for why in _problems(ranked, pairs):
        raise _refused(name, why)
    return pairs


def _problems(ranked: Ranked, pairs: pl.DataFrame) -> Iterator[str]:
    """What makes them no pairs; the first one is true, those after it may follow from it."""
    size = ranked.flat.height
    if not all(kind.is_integer() for kind in pairs.dtypes) or any(pairs.null_count().row(0)):
        yield "its columns are not whole numbers, the positions in ranked.flat"
    elif not pairs.select(pl.all_horizontal(pl.all().is_between(0, size - 1)).all()).item():
        yield f"a position is outside of the {size} rows of ranked.flat"
    else:
        prompts, rewards = ([ranked.flat[name].gather(pairs[side]) for side in _SIDES] for name in ("prompt", "reward"))
        if not (prompts[0] == prompts[1]).all():
            yield "a pair has completions of two prompts"
        if not (rewards[0] > rewards[1]).all():
            yield "the chosen completion of a pair has no higher reward than the rejected one"
        if pairs.is_duplicated().any():
            yield "a pair is there twice"


def _refused(name: str, why: str) -> UsageError:
    return UsageError(f"pair rule {name} cannot be used: {why}", _CONTRACT)
