"""What the program knows of each loss, the settings that losses read, and their weighted sum. No tensors here.

A loss consists of its entry in LOSSES and a function of the same name in prefpipe/stages/train/losses, in the module
for the rows that it trains on. A setting that only this loss reads is a field of LossSettings. No other file knows its
name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from prefpipe.config import names as naming
from prefpipe.config.base import ADDED, Config, Heading

Kind = Literal["pairs", "labels", "groups"]
Need = Literal["reference", "preference_prob", "reward_gap", "z0"]
LOG_RATIO_SETTINGS = ("beta", "ld_alpha")  # read by every loss that is a function of the two log-ratios of a pair
MARGIN_SETTINGS = ("simpo_gamma", "simpo_gamma_beta_ratio")
CLASS_SETTINGS = ("beta", "desirable_weight", "undesirable_weight")
_REWARD_OF_1 = "beta {beta:g}, a reward of 1 is 1/beta = {one}"
_MARGIN = "beta {beta:g}, target margin gamma / beta = {margin:.4g} nats per token"
_SQUARES = "log-ratios are drawn to at most +-1/(2 beta) = {half}"
_LARGEST_TARGET = 2.0  # nats per token: no policy that still speaks moves so far
_LARGEST_MARGIN = 2.0  # nats per token: SimPO's published margins are 0.1 to 0.5


@dataclass(frozen=True)
class Loss:
    """What the program must know of a loss beside its formula."""

    settings: tuple[str, ...]
    """Fields of LossSettings that it reads; all losses of pairs read use_weighting too."""
    kind: Kind = "pairs"
    """The rows that it trains on."""
    needs: tuple[Need, ...] = ("reference",)
    """What it reads beside the log-probs of the policy: reference log-probs, columns of the pairs, KTO's z0."""
    beta: Literal["per nat", "per nat per token", "no temperature"] = "per nat"
    """What beta multiplies: summed log-probs, log-probs per token, or none of them."""
    per_token_if: tuple[str, str] | None = None
    """A setting and the value of it with which log-probs per token take the place of sums."""
    target: str = _REWARD_OF_1
    """What it aims at, in words: {one} is 1/beta and {half} 1/(2 beta) in nats, {margin} is SimPO's."""
    smoothing_stops_it: bool = False
    """label_smoothing e gives it a finite optimum, log((1 - e)/e) / beta nats."""
    largest_target: float | None = None
    """Largest 1/(2 beta) without a warning, in nats per token; None: beta is compared with the smallest usual one."""
    settings_above_0: Mapping[str, str] = field(default_factory=dict[str, str])
    """Settings that may be 0 for other losses but not for this one, each with the reason or a usual value."""
    logarithm_of: Mapping[str, str] = field(default_factory=dict[str, str])
    """Columns that it takes the logarithm of, each with what to do about values that have none."""

    @property
    def reads(self) -> tuple[str, ...]:
        """All settings that have an effect with this loss."""
        return (*self.settings, "use_weighting") if self.kind == "pairs" else self.settings


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss((*LOG_RATIO_SETTINGS, "label_smoothing"), smoothing_stops_it=True),
    "sigmoid_norm": Loss((*LOG_RATIO_SETTINGS, "label_smoothing"), beta="per nat per token"),
    "hinge": Loss(LOG_RATIO_SETTINGS),
    "ipo": Loss(
        (*LOG_RATIO_SETTINGS, "ipo_reduction"),
        per_token_if=("ipo_reduction", "mean"),
        target="h is drawn to 1/(2 beta) = {half}",
        largest_target=_LARGEST_TARGET,
    ),
    "robust": Loss((*LOG_RATIO_SETTINGS, "label_smoothing")),
    "exo_pair": Loss(
        (*LOG_RATIO_SETTINGS, "label_smoothing"),
        smoothing_stops_it=True,
        settings_above_0={"label_smoothing": "its paper uses 1e-3"},
    ),
    "nca_pair": Loss(LOG_RATIO_SETTINGS),
    "bco_pair": Loss(LOG_RATIO_SETTINGS),
    "sppo_hard": Loss(LOG_RATIO_SETTINGS, target=_SQUARES),
    "sppo": Loss(LOG_RATIO_SETTINGS, needs=("reference", "preference_prob"), target=_SQUARES),
    "cal_dpo": Loss(
        (*LOG_RATIO_SETTINGS, "cal_dpo_weight"),
        target="log-ratios are drawn to +-1/(2 beta) = {half}",
        largest_target=_LARGEST_TARGET,
    ),
    "apo_zero": Loss(LOG_RATIO_SETTINGS),
    "apo_down": Loss(LOG_RATIO_SETTINGS),
    "dpop": Loss((*LOG_RATIO_SETTINGS, "dpop_lambda")),
    "rdpo": Loss((*LOG_RATIO_SETTINGS, "rdpo_alpha")),
    "margin": Loss((*LOG_RATIO_SETTINGS, "margin_alpha"), needs=("reference", "reward_gap")),
    "odpo": Loss(
        (*LOG_RATIO_SETTINGS, "margin_alpha"),
        needs=("reference", "reward_gap"),
        logarithm_of={"reward_gap": "drop these pairs, or use the loss margin"},
    ),
    "soft": Loss(LOG_RATIO_SETTINGS, needs=("reference", "preference_prob")),
    "rainbow": Loss(("beta", "rainbow_mix", "rainbow_margin"), beta="per nat per token"),
    "simpo": Loss(("beta", *MARGIN_SETTINGS, "label_smoothing"), needs=(), beta="per nat per token", target=_MARGIN),
    "alphapo": Loss(("beta", *MARGIN_SETTINGS, "alphapo_alpha"), needs=(), beta="per nat per token", target=_MARGIN),
    "cpo": Loss(
        ("beta", "label_smoothing"), needs=(), target=f"{_REWARD_OF_1} of log-prob difference", smoothing_stops_it=True
    ),
    "orpo": Loss(("beta", "nll_scope"), needs=(), beta="no temperature", target=""),
    "nll": Loss(("nll_scope",), needs=(), beta="no temperature", target=""),
    "kto": Loss((*CLASS_SETTINGS, "kl_bank_size", "kl_rows"), kind="labels", needs=("reference", "z0")),
    "apo_zero_unpaired": Loss(CLASS_SETTINGS, kind="labels"),
    "plackett_luce": Loss(("beta",), kind="groups"),
}
OTHER_NAMES = {  # names in papers and other programs that are not similar to the name here
    "sft": "'nll'",
    "dpo": "'sigmoid'",
    "cdpo": "'sigmoid' with label_smoothing",
    "ld_dpo": "'sigmoid' with ld_alpha",
    "wpo": "'sigmoid' with use_weighting",
}
if TYPE_CHECKING:
    LossName = str
else:  # the names of the table, and functions of users, are the words that a recipe may use
    LossName = naming.name_or_function(tuple(LOSSES))


def loss_of(name: str, rows: Kind = "pairs") -> Loss:
    """The entry of a loss by its name. A function of the user may read every setting and column; its target is unknown,
    so that nothing is said of it."""
    if name in LOSSES:
        return LOSSES[name]
    unread = ("use_weighting", *(setting for setting in LossSettings.model_fields if readers(setting) == ("kto",)))
    settings = tuple(setting for setting in LossSettings.model_fields if setting not in unread)
    return Loss(settings, rows, beta="no temperature", target="")


def names(kind: Kind) -> tuple[str, ...]:
    """The losses that train on rows of this kind."""
    return tuple(name for name, loss in LOSSES.items() if loss.kind == kind)


def readers(setting: str) -> tuple[str, ...]:
    """The losses that read a setting."""
    return tuple(name for name, loss in LOSSES.items() if setting in loss.reads)


class LossSettings(Config):
    """The settings that losses read, with their defaults. TrainConfig has them as settings of `prefpipe train`.

    The help of a setting that at most three losses read begins with their names, which are added below.
    """

    beta: Annotated[
        float,
        Heading("Settings of many losses"),
        Field(
            gt=0,
            description="Temperature of the implicit reward beta * (logp - ref_logp), per summed nat; per nat per "
            f"token for {', '.join(name for name, loss in LOSSES.items() if loss.beta == 'per nat per token')}; tau of "
            "ipo; the weight lambda of orpo's odds ratio.",
        ),
    ] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is flipped: cDPO with sigmoid, robust DPO with robust; exo_pair needs one."""
    use_weighting: bool = False
    """WPO: weigh every pair by how likely the policy itself would be to say both completions."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """LD-DPO: weight of the tokens beyond the length of the shorter side, under policy and reference alike."""
    ipo_reduction: Annotated[Literal["sum", "mean"], Heading("Settings of single losses")] = "sum"
    """the target 1/(2 beta) is in nats per sequence (sum, the paper) or per token (mean, TRL)."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.0
    """target margin gamma; 0 takes it from simpo_gamma_beta_ratio."""
    simpo_gamma_beta_ratio: Annotated[float, Field(ge=0)] = 0.5
    """target margin as gamma / beta, in nats per token; not together with simpo_gamma."""
    alphapo_alpha: Annotated[float, Field(gt=0)] = 0.25
    """shape of the reward (1 - p^-alpha) / alpha."""
    cal_dpo_weight: Annotated[float, ADDED, Field(ge=0)] = 1.0
    """weight of the calibration, the squared distances of both log-ratios from +-1/(2 beta)."""
    dpop_lambda: Annotated[float, Field(ge=0)] = 50.0
    """weight of the penalty on a chosen completion that falls below the reference."""
    rdpo_alpha: float = 0.01
    """weight of the difference of lengths, in reward per token."""
    margin_alpha: Annotated[float, Field(ge=0)] = 1.0
    """weight of reward_gap, or of its logarithm."""
    rainbow_mix: Annotated[float, Field(ge=0, le=1)] = 0.25
    """share of the reference's mean log-probs."""
    rainbow_margin: Annotated[float, Field(ge=0)] = 0.1
    """target margin in nats per token."""
    nll_scope: Literal["response", "prompt_response"] = "response"
    """what the NLL covers, the chosen completion or its prompt too (as the authors' ORPO does)."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """class weight lambda_D of desirable rows; lambda_D n_D / (lambda_U n_U) belongs in [1, 3/2]."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """class weight lambda_U of undesirable rows."""
    kl_bank_size: Annotated[int, Field(ge=1)] = 256
    """mismatched rows to build for its reference point z0, where the data brings none."""
    kl_rows: Annotated[int, Field(ge=1)] = 16
    """mismatched rows that every step looks at (a forward pass each, without gradient)."""

    @property
    def margin(self) -> float:
        """SimPO's target margin gamma / beta, in nats per token."""
        return self.simpo_gamma / self.beta or self.simpo_gamma_beta_ratio


for _name, _info in LossSettings.model_fields.items():
    if len(readers(_name)) <= 3:
        _info.description = f"{', '.join(readers(_name))}: {_info.description}"


@dataclass(frozen=True)
class Objective:
    """The weighted sum of losses that a run minimises, and their settings. `rows` is the kind of rows for functions of
    the user, which can train on any kind."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    settings: LossSettings
    rows: Kind = "pairs"

    @property
    def kind(self) -> Kind:
        """The kind of rows that the losses train on; `misfits` reports losses of different kinds."""
        for name in self.names:
            if name in LOSSES:
                return LOSSES[name].kind
        return self.rows

    def needs(self, what: Need) -> bool:
        """Whether at least one of the losses reads `what`."""
        return any(what in loss_of(name).needs for name in self.names)

    def with_reference(self) -> "Objective":
        """The sum of those losses that read reference log-probs."""
        kept = [(n, w) for n, w in zip(self.names, self.weights, strict=True) if "reference" in loss_of(n).needs]
        return Objective(tuple(n for n, _ in kept), tuple(w for _, w in kept), self.settings, self.rows)


def misfits(objective: Objective) -> Iterator[str]:
    """One sentence for each mistake: losses that do not add up, settings that no loss reads, values that it cannot
    use."""
    losses, settings = objective.names, objective.settings
    if len(objective.weights) != len(losses):
        yield f"{len(losses)} losses but {len(objective.weights)} loss_weights: give one each"
    if len(set(losses)) != len(losses):
        yield f"a loss twice in loss_type {losses}: give it once, with their weight"
    if len({LOSSES[name].kind for name in losses if name in LOSSES}) > 1:
        yield f"losses of different kinds of rows do not add up: {', '.join(losses)}"
    read = {setting for name in losses for setting in loss_of(name, objective.kind).reads}
    for name in sorted(LossSettings.model_fields.keys() - read):
        value = getattr(settings, name)
        if value != LossSettings.model_fields[name].default:
            yield f"{name} = {value} is read by none of {', '.join(losses)} ({', '.join(readers(name))})"
    for loss in losses:
        lacking = [item for item in loss_of(loss).settings_above_0.items() if not getattr(settings, item[0]) > 0]
        yield from (f"{loss} needs {name} above 0: {reason}" for name, reason in lacking)
    if read & set(MARGIN_SETTINGS):
        yield from _margin_misfits(settings)


def _margin_misfits(settings: LossSettings) -> Iterator[str]:
    default = LossSettings.model_fields["simpo_gamma_beta_ratio"].default
    if settings.simpo_gamma and settings.simpo_gamma_beta_ratio != default:
        yield "simpo_gamma and simpo_gamma_beta_ratio are two names of one margin: give one of them"
    if settings.margin > _LARGEST_MARGIN:
        yield (
            f"a margin gamma / beta of {settings.margin:g} nats per token is out of reach (limit {_LARGEST_MARGIN:g}): "
            "lower simpo_gamma, or raise beta (SimPO's is 2 to 10)"
        )


CLASS_RATIO = (1.0, 1.5)  # lambda_D n_D / (lambda_U n_U): Ethayarajh et al. 2024 (2402.01306), section 4.1 and eq. 9
PROPOSED_CLASS_RATIO = 1.25


def in_class_ratio(ratio: float) -> bool:
    """Whether a ratio of weighted desirable to undesirable rows is in the range that KTO's authors recommend."""
    smallest, largest = CLASS_RATIO
    return smallest <= ratio <= largest


def class_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """lambda_D and lambda_U for these numbers of rows (both above 0): one is 1, and the weighted ratio becomes 1.25."""
    ratio = desirable / undesirable
    if ratio < PROPOSED_CLASS_RATIO:
        return PROPOSED_CLASS_RATIO / ratio, 1.0
    return 1.0, ratio / PROPOSED_CLASS_RATIO
