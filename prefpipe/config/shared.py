"""Field types that several commands share, so that one thing has one name, one check and one help text."""

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from prefpipe.config import rewards
from prefpipe.config.base import ADDED, PATH, suggestion

DEFAULT_MODEL = "embedded:smollm2-135m-instruct"
REWARD_NAMES = tuple(rewards.KINDS)
IMPORTED_REWARD = "rating"  # the name of ratings that stand in files of foreign answers


def check_reward(name: str, info: ValidationInfo) -> str:
    """The name of a reward. Raises ValueError unless it is a kind, a table of reward_settings or `module:function`."""
    tables = info.data.get("reward_settings")  # None when the tables are refused: that error is enough
    if name == IMPORTED_REWARD:
        raise ValueError(f"'{name}' is the name of the ratings that `prefpipe score` imports: rename the table")
    if name in REWARD_NAMES or ":" in name or tables is None or name in tables:
        return name
    known = [*tables, *REWARD_NAMES]
    raise ValueError(
        f"no such reward{suggestion(name, known)}; rewards are {', '.join(known)}, "
        "a table [reward_settings.NAME] or your own 'module:function'"
    )


def _check_object(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError('not a JSON object such as {"enable_thinking": false}')
    return text


Model = Annotated[str, PATH, Field(description="Model: a directory, a hub id, or embedded:smollm2-135m-instruct.")]
Adapter = Annotated[str, PATH, Field(description="Directory of a PEFT LoRA adapter on top of the model, or 'none'.")]
ChatTemplate = Annotated[
    str,
    PATH,
    Field(
        description="'model' for the model's chat template, the name of one of several, a Jinja file, or 'none' for "
        "plain text that ends with the end-of-sequence token."
    ),
]
TemplateKwargs = Annotated[
    str,
    ADDED,
    AfterValidator(_check_object),
    Field(
        description='JSON of what the chat template gets beside the messages, such as {"enable_thinking": false}; the '
        "column chat_template_kwargs of a row goes before it."
    ),
]
TemplateChanges = Annotated[
    Literal["drop", "allow"],
    ADDED,
    Field(
        description="A row whose text the chat template leaves out, or whose prompt it renders otherwise when an "
        "answer follows: drop it, or allow both."
    ),
]
Column = Annotated[
    tuple[str, ...],
    ADDED,
    Field(description="NAME=COLUMN: a column of a foreign file under the name that docs/datasets.md gives it."),
]
Split = Annotated[str, Field(description="Value of the `split` column whose prompts to use; 'all' for every prompt.")]
RewardName = Annotated[str, AfterValidator(check_reward)]  # a class declares reward_settings before such a field
REWARD_CHOICES = f"{', '.join(REWARD_NAMES)}, the name of a table [reward_settings.NAME], or your own 'module:function'"
Rewards = Annotated[tuple[RewardName, ...], Field(description=f"Rewards for every completion: {REWARD_CHOICES}.")]
PART = r"^[1-9]\d*/[1-9]\d*$"
CLUSTER = r"^(ray(://\S+)?)?$"
Seed = Annotated[int, Field(ge=0, description="Seed of everything random in this run.")]
