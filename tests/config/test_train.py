"""Settings of train that contradict each other, or that nothing would read: told before anything is loaded."""

import pytest
from pydantic import ValidationError

from prefpipe.config.train import TrainConfig


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tuning": "full", "lora_r": 8}, "lora_r = 8 is read only with tuning = lora"),
        ({"tuning": "full", "merge": True}, "merge = True is read only with tuning = lora"),
        ({"tuning": "full", "load_in_4bit": True}, "load_in_4bit = True is read only"),
        ({"tuning": "full", "adapter": "some/adapter"}, "trains no adapter: merge it first"),
        ({"warmup_steps": 5, "warmup_ratio": 0.2}, "two lengths of one warmup"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "choose constant_with_warmup"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.2}, "choose constant_with_warmup"),
        ({"eval_split": 0.1, "eval_pairs": ("e.jsonl",)}, "give one of them"),
        ({"eval_split": 0.1, "eval_groups": ("e",)}, "eval_groups and eval_split both say"),
        ({"eval_steps": 5}, "eval_steps = 5 needs something to evaluate on: give eval_split, or eval_pairs"),
        ({"eval_steps": 5, "loss_type": ("kto",)}, "give eval_split, or eval_labels"),
        ({"load_best_model_at_end": True}, "needs something to evaluate on"),
        ({"early_stopping_patience": 2}, "needs something to evaluate on"),
        ({"eval_split": 0.1, "metric_for_best_model": "eval_rewards/margins"}, "is read only with"),
        ({"distributed": "fsdp2", "optim": "adamw_8bit"}, "use ddp"),
        ({"distributed": "fsdp2", "load_in_4bit": True}, "use ddp"),
        ({"lora_target_parameters": "w", "lora_dropout": 0.1}, "lora_dropout = 0.1 does not work with lora_target_par"),
        (
            {"lora_target_parameters": "w", "load_in_4bit": True},
            "load_in_4bit = True does not work with lora_target_par",
        ),
        ({"lora_target_parameters": "w", "distributed": "fsdp2"}, "distributed = fsdp2 does not work with lora_target"),
        (
            {"lora_target_parameters": "w", "tuning": "full"},
            "lora_target_parameters = w is read only with tuning = lora",
        ),
        ({"router_aux_loss_coef": -0.1}, "greater than or equal to 0"),
        ({"eval_split": 1.0}, "less than 1"),
        ({"reference_model": "unavailable", "reference_adapter": "a"}, "reference_model = unavailable loads none"),
    ],
)
def test_what_does_not_go_together_is_told(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"tuning": "full", "optim": "rmsprop"},
        {"warmup_steps": 5},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
        {"eval_split": 0.1, "early_stopping_patience": 2, "metric_for_best_model": "eval_rewards/margins"},
        {"eval_pairs": ("e.jsonl",), "load_best_model_at_end": True},
        {"loss_type": ("kto",), "eval_labels": ("e.jsonl",), "eval_steps": 5},
    ],
)
def test_what_goes_together_passes(given: dict[str, object]) -> None:
    TrainConfig.model_validate(given)
