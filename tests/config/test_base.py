"""Settings load once, from defaults < recipe < flags, with every error at once, and survive being saved."""

import json
import tempfile
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import annotated_types
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prefpipe.cli import STAGES
from prefpipe.config import base
from prefpipe.config.build_pairs import SUBSETS, BuildPairsConfig, unread
from prefpipe.config.commands import SETTINGS
from prefpipe.config.engine import EngineConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.iterate import SCHEDULES, IterateConfig
from prefpipe.config.losses import LOSSES, MARGIN_SETTINGS, LossSettings
from prefpipe.config.names import known
from prefpipe.config.score import ScoreConfig
from prefpipe.config.stops import StopSettings
from prefpipe.config.sweep import SweepConfig
from prefpipe.config.train import EVAL_ONLY, LORA_ONLY, NO_PARAMETERS, SFT_ONLY, TrainConfig
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id

CLASSES = (GenerateConfig, ScoreConfig, BuildPairsConfig, TrainConfig, EvaluateConfig, IterateConfig, SweepConfig)
RUNTIME = {
    *("distributed", "shard_rows", "max_num_seqs", "kv_cache_mib", "max_tokens_per_micro_batch", "save_steps"),
    *("gradient_checkpointing", "save_total_limit", "report_to", "report"),
    *("tensor_parallel_size", "gpu_memory_utilization", "max_tokens_per_batch", "template_date", "strict"),
    *("rounds", "launcher", "keep_engine", "workers", "cluster", *StopSettings.model_fields),
    *("base_urls", "api_key_env", "timeout_seconds"),
    *("grid", "samples", "halving", "metric_for_best_variant", "evaluate"),
}
PATHS = {
    *("model", "adapter", "chat_template", "prompts", "completions", "pairs", "labels", "groups", "ref_logps"),
    *("inputs", "reward_settings", "eval_pairs", "eval_labels", "eval_groups", "reward_runs", "policy_logps"),
    *("contamination", "reference_model", "reference_adapter", "sft", "baseline", "trained_on", "perplexity_text"),
    *("from_run", "optimizer_from"),
}
OWNED = {
    *("generate.model", "generate.adapter", "generate.reference", "build_pairs.completions"),
    *("build_pairs.reward_runs", "build_pairs.ref_logps", "build_pairs.policy_logps"),
    *(
        "train.model",
        "train.adapter",
        "train.pairs",
        "train.labels",
        "train.groups",
        "train.ref_logps",
        "train.reference_model",
        "train.reference_adapter",
        "train.optimizer_from",
        "evaluate.model",
        "evaluate.adapter",
        "evaluate.round",
    ),
}  # `iterate` sets these itself
SOME = {
    "judge": ("",),  # another value needs its table
    "api_key_env": ("VLLM_API_KEY", "MY_KEY"),
    "base_urls": (("http://a:8000", "https://[::1]/v1"),),
    "grid": (("max_grad_norm=0.5,2.0",), ("max_grad_norm=0.5..2", "weight_decay=0,0.1")),
    "halving": ((0.25,), (0.25, 0.5)),
    "chat_template_kwargs": ("{}", '{"enable_thinking": false}'),
}
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12)


def load(cls: type[BaseModel], text: str, flags: dict[str, Any] | None = None, suffix: str = ".toml") -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"recipe{suffix}"
        path.write_text(text, encoding="utf-8")
        return base.load(cls, path, flags or {})


def values(name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    """Legal values of a field, from its annotation and bounds."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("reward", "rewards"):
        one = st.sampled_from(("short_sentence", "my.module:function"))
        return one if leaf == "reward" else st.lists(one, max_size=3).map(tuple)
    if leaf == "guard":
        guards = st.sampled_from(("a.jsonl:length", "hf:owner/name:my.module:function"))
        return st.lists(guards, min_size=1, max_size=2).map(tuple)
    if leaf == "workers":
        return st.sampled_from((1, 8) if field.annotation is int else ("auto", 1, 8))
    if leaf in SOME:
        return st.sampled_from(SOME[leaf])
    if leaf == "guard_pass_reward":
        return st.lists(st.floats(-9, 9), max_size=1).map(tuple)  # more need as many guards
    if leaf == "reward_settings":
        table = st.fixed_dictionaries({"kind": st.just("length"), "min": st.integers(0, 9), "unit": st.just("tokens")})
        return st.dictionaries(st.sampled_from(("mine", "length", "b-2")), table, max_size=2)
    if typing.get_origin(field.annotation) is tuple:
        kind = typing.get_args(field.annotation)[0]  # of an entry; it may have bounds of its own
        marks = kind.__metadata__ if typing.get_origin(kind) is Annotated else ()
        bounds = list(marks) if known(marks) else list(marks[0].metadata) if marks else []
        return st.lists(
            _one(getattr(kind, "__origin__", kind) if bounds else kind, bounds), min_size=1, max_size=3
        ).map(tuple)
    return _one(field.annotation, field.metadata)


def _one(kind: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    if names := known(metadata) or (typing.get_args(kind) if typing.get_origin(kind) is Literal else ()):
        return st.sampled_from(names)
    bounds: dict[str, Any] = {}
    for m in metadata:
        if isinstance(m, annotated_types.Ge | annotated_types.Gt):
            bounds |= {"min_value": getattr(m, "ge", getattr(m, "gt", None))}
            bounds |= {"exclude_min": True} if isinstance(m, annotated_types.Gt) else {}
        if isinstance(m, annotated_types.Le | annotated_types.Lt):
            bounds |= {"max_value": getattr(m, "le", getattr(m, "lt", None))}
            bounds |= {"exclude_max": True} if isinstance(m, annotated_types.Lt) else {}
    patterns = [m.pattern for m in metadata if getattr(m, "pattern", None)]
    if patterns:
        return st.from_regex(patterns[0], fullmatch=True).filter(str.isascii)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(**bounds)
    return st.floats(allow_nan=False, allow_infinity=False, **bounds) if kind is float else TEXT


@st.composite
def changes(draw: st.DrawFn, cls: type[BaseModel]) -> dict[str, Any]:
    """Some settings of a class with legal values, by dotted name."""
    there = {name: field for name, field in base.fields(cls) if cls is not IterateConfig or name not in OWNED}
    names = draw(st.lists(st.sampled_from(sorted(there)), max_size=8, unique=True))
    found = {name: draw(values(name, there[name])) for name in names}
    for name in [n for n in there if n.endswith("loss_type") and (n in found or f"{n[:-4]}weights" in found)]:
        weights = f"{name[:-4]}weights"
        losses = found[name] = _of_one_kind(found.get(name) or draw(values(name, there[name])))
        found[weights] = tuple(draw(st.floats(0.1, 9)) for _ in losses)
    for prefix in [name[: -len("loss_type")] for name in there if name.endswith("loss_type")]:
        _keep_what_is_read(found, prefix)
        _keep_what_goes_together(found, prefix)
        _keep_one_weight_for_each_source(found, prefix)
    if cls is IterateConfig:
        _keep_rounds_that_fit(found)
        found |= {
            "build_pairs.output": LOSSES[found.get("train.loss_type", ("sigmoid",))[0]].kind,
            "build_pairs.format": "prefpipe",
        }
    for prefix in [name[: -len("engine")] for name in there if name.endswith("engine")]:
        found.pop(f"{prefix}base_urls", None)
        if found.get(f"{prefix}engine") == "server":
            found[f"{prefix}base_urls"] = draw(values("base_urls", there[f"{prefix}base_urls"]))
    if cls is ScoreConfig and not found.get("rewards"):
        found.pop("reference", None)  # with neither, there is nothing to do for runs
    _keep_variants_that_fit(found)
    if cls in (IterateConfig, BuildPairsConfig):
        _keep_what_build_pairs_reads(found, "build_pairs." if cls is IterateConfig else "")
    return found


def _keep_what_build_pairs_reads(found: dict[str, Any], prefix: str) -> None:
    """Drop settings that the choices among them do not read; a subset of trained log-probs, a format of groups."""
    needs = {name for name, logps in SUBSETS.items() if "policy" in logps}
    if found.get(f"{prefix}subset") in needs and not found.get(f"{prefix}policy_logps"):
        found.pop(f"{prefix}subset")
    if found.get(f"{prefix}output") == "groups":
        found.pop(f"{prefix}format", None)
    if not found.get(f"{prefix}contamination"):
        found.pop(f"{prefix}contamination_ngram", None)
    if found.get(f"{prefix}cluster"):
        found.pop(f"{prefix}workers", None)
    chosen = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    for name in unread({**dict(BuildPairsConfig()), **chosen}):
        found.pop(f"{prefix}{name}", None)


def _keep_rounds_that_fit(found: dict[str, Any]) -> None:
    """Drop schedules of settings that are set or that no loss reads, parts beside prompts_per_round, references that no
    loss reads, rounds to take or replay from nowhere, and an optimizer that goes on where weights start anew."""
    losses = found.get("train.loss_type", ("sigmoid",))
    for schedule, places in SCHEDULES.items():
        if any(f"{table}.{name}" in found for table, name in places):
            found.pop(schedule, None)
    if not all("beta" in LOSSES[name].reads for name in losses):
        found.pop("betas", None)
    if not any("reference" in LOSSES[name].needs for name in losses):
        found.pop("reference", None)
    if "prompts_per_round" in found:
        found.pop("generate.part", None)
    else:
        found.pop("repeat_prompts", None)
    unread = {
        "replay_rounds": not found.get("replay"),
        "from_round": "from_run" not in found,
        "optimizer": found.get("start") == "base",
    }
    for name in [name for name, holds in unread.items() if holds]:
        found.pop(name, None)
    found["rounds"] = found.get("rounds", 2) + found.get("from_round", 0)


def _keep_variants_that_fit(found: dict[str, Any]) -> None:
    """As many draws as a range gives, none from a list; halving by held-out pairs."""
    if any(".." in entry for entry in found.get("grid", ())):
        found["samples"] = 1 + found.get("samples", 0) % 9
    else:
        found.pop("samples", None)
    if "halving" in found:
        found.pop("metric_for_best_variant", None)


def _of_one_kind(losses: tuple[str, ...]) -> tuple[str, ...]:
    """Each loss once, and only those that train on the same rows as the first."""
    return tuple(dict.fromkeys(name for name in losses if LOSSES[name].kind == LOSSES[losses[0]].kind))


def _keep_what_is_read(found: dict[str, Any], prefix: str) -> None:
    """Drop settings that the losses do not read, and margins out of reach; settings that may not be 0 are not."""
    losses = found.get(f"{prefix}loss_type", ("sigmoid",))
    read = {setting for name in losses for setting in LOSSES[name].reads} - set(MARGIN_SETTINGS)
    for setting in LossSettings.model_fields.keys() - read:
        found.pop(f"{prefix}{setting}", None)
    for setting in {setting for name in losses for setting in LOSSES[name].settings_above_0}:
        found[f"{prefix}{setting}"] = found.get(f"{prefix}{setting}") or 0.125


def _keep_what_goes_together(found: dict[str, Any], prefix: str) -> None:
    """Drop settings of adapters without an adapter or beside adapted parameters, of evaluations and rows to imitate
    without rows, and second lengths of one warmup."""

    def drop(*names: str) -> None:
        for name in names:
            found.pop(prefix + name, None)

    drop("distributed") if {prefix + "optim", prefix + "load_in_4bit"} & found.keys() else None
    if found.get(prefix + "tuning") == "full":
        drop("adapter", *LORA_ONLY)
    drop(*NO_PARAMETERS) if found.get(prefix + "lora_target_parameters") else None
    drop(*SFT_ONLY) if prefix + "sft" not in found else None
    drop("warmup_steps") if prefix + "warmup_ratio" in found else None
    drop("warmup_steps", "warmup_ratio") if found.get(prefix + "lr_scheduler_type") == "constant" else None
    if {prefix + name for name in ("eval_pairs", "eval_labels", "eval_groups")} & found.keys():
        drop("eval_split")
    elif not found.get(prefix + "eval_split"):
        drop(*EVAL_ONLY)
    if not found.get(prefix + "load_best_model_at_end") and not found.get(prefix + "early_stopping_patience"):
        drop("metric_for_best_model")


def _keep_one_weight_for_each_source(found: dict[str, Any], prefix: str) -> None:
    """Weights of the sources that the losses train on; none without sources (`iterate` names none)."""
    sources = found.get(prefix + LOSSES[found.get(prefix + "loss_type", ("sigmoid",))[0]].kind, ())
    weights = found.pop(prefix + "source_weights", ())
    if sources and weights and found.get(prefix + "train_order") != "given":
        found[prefix + "source_weights"] = tuple(weights[i % len(weights)] for i in range(len(sources)))
    else:
        found.pop(prefix + "epoch_length", None)


def typed_value(value: object) -> object:
    """A value as the command line gives it."""
    if isinstance(value, dict):
        return json.dumps(value)
    return [str(x) for x in value] if isinstance(value, tuple) else str(value)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *tables, leaf = name.split(".")
        inner = tree
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[leaf] = value
    return tree


@pytest.mark.parametrize("cls", CLASSES)
def test_flags_save_and_load_give_the_same_config(cls: type[BaseModel]) -> None:
    @settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    @given(flat=changes(cls))
    def check(flat: dict[str, Any]) -> None:
        direct = cls.model_validate(nested(flat))
        typed = {n: typed_value(v) for n, v in flat.items()}
        loaded = base.load(cls, None, {n: v for n, v in typed.items() if v != []})
        assert loaded == direct
        saved = json.dumps({"command": "x", "config": base.dump(loaded), "identity": {}}, ensure_ascii=False)
        assert load(cls, saved, suffix=".json") == direct
        assert load(cls, json.dumps(base.dump(loaded)), suffix=".json") == direct
        assert load(cls, base.to_toml(loaded)) == direct

    check()


@pytest.mark.parametrize("cls", CLASSES)
def test_the_fingerprint_ignores_runtime_settings_and_paths_and_nothing_else(cls: type[BaseModel]) -> None:
    names = {name for name, _ in base.fields(cls)}
    ignored = {n for n in names if n.rsplit(".", 1)[-1] in RUNTIME | PATHS}
    ignored |= {n for n, field in base.fields(cls) if base.BESIDE in field.metadata and "." not in n}
    added = {name: field.default for name, field in base.fields(cls) if base.ADDED in field.metadata}
    assert set(base.result_fields(cls())) == names - ignored - added.keys()

    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    @given(flat=changes(cls))
    def check(flat: dict[str, Any]) -> None:
        changed = added | base.result_fields(cls.model_validate(nested(flat)))
        default = added | base.result_fields(cls())
        assert {n for n in changed if changed[n] != default[n]} <= set(flat) - ignored
        assert all(changed[n] == flat[n] for n in flat if n not in ignored)

    check()


@pytest.mark.parametrize("cls", CLASSES)
def test_runs_that_were_made_before_keep_their_fingerprint(cls: type[BaseModel]) -> None:
    """Ids of the default settings of released commands, with the reward and the number type that they had.
    Another id orphans every run
    that users have: annotate a new setting with ADDED, and never change a default."""
    then = {"reward": "short_sentence", "dtype": "bfloat16"}
    named = {n: then[n.rpartition(".")[2]] for n, _ in base.fields(cls) if n.rpartition(".")[2] in then}
    config = base.load(cls, None, named)
    if isinstance(config, TrainConfig):
        config = config.resolved  # as the run does
    if isinstance(config, IterateConfig):
        config = config.model_copy(update={"train": config.train.resolved})
    values = json.loads(json.dumps(base.result_fields(config)))
    if isinstance(config, IterateConfig):
        values |= {"rounds": config.rounds}  # it had a part in the identity, and a run that has it there keeps it
    assert (
        content_id(values)
        == {
            GenerateConfig: "6117daaaca7db429211ef84716406abb",
            ScoreConfig: "33955b82c931468bb8bc5bceec4c202c",
            BuildPairsConfig: "d6fa67cd99d9f9ebe6a44ae166f87bb4",
            TrainConfig: "793031056e87d31892b0e3d8c0d9824b",
            EvaluateConfig: "5e801b2ab4adb903f4ff430f71b1dac7",
            IterateConfig: "aee1d7f95f228412d6eb660f6f4aedc7",
            SweepConfig: "793031056e87d31892b0e3d8c0d9824b",  # that of train: the rest is free
        }[cls]
    )


class Younger(base.Config):
    seed: int = 0
    power: Annotated[float, base.ADDED] = 2.0


def test_an_added_setting_enters_the_fingerprint_once_it_has_another_value() -> None:
    assert base.result_fields(Younger()) == {"seed": 0}
    assert base.result_fields(Younger(power=2.0)) == {"seed": 0}
    assert base.result_fields(Younger(power=1.0)) == {"seed": 0, "power": 1.0}
    assert base.dump(Younger()) == {"seed": 0, "power": 2.0}


class Asking(base.Config):
    reward: Annotated[tuple[str, ...], base.FIRST] = ()
    guard: Annotated[tuple[str, ...], base.ADDED, base.BESIDE] = ()


class Rounds(base.Config):
    evaluate: Asking = Asking()


def test_what_is_asked_for_beside_the_answers_identifies_no_run_but_that_of_its_rounds() -> None:
    """A list that was a text before counts by its first entry, as that text."""
    assert base.result_fields(Asking()) == {"reward": ""}
    asked = Asking(reward=("a", "b"), guard=("g",))
    assert base.result_fields(asked) == {"reward": "a"}
    assert base.result_fields(Rounds(evaluate=asked)) == {"evaluate.reward": "a", "evaluate.guard": ("g",)}
    assert base.result_fields(Rounds()) == {"evaluate.reward": ""}


class Headed(base.Config):
    HEADINGS: ClassVar = ("Second", "First")
    one: Annotated[int, base.Heading("First")] = 1
    """One."""
    two: int = 2
    """Two."""
    three: Annotated[int, base.Heading("Second")] = 3
    """Three."""


def test_settings_stand_under_the_headings_in_their_order() -> None:
    found = [(name, heading) for name, _, heading in base.fields_under_headings(Headed)]
    assert found == [("three", "Second"), ("one", "First"), ("two", "First")]
    lines = base.to_toml(Headed()).splitlines()
    headings = ["# ---- Second ----", "# ---- First ----"]
    assert [line for line in lines if line.startswith("# ----")] == headings
    assert lines.index("# ---- First ----") < lines.index("one = 1") < lines.index("two = 2")


def test_a_heading_that_the_class_does_not_list_is_an_error() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        list(base.fields_under_headings(LossSettings))


@pytest.mark.parametrize("cls", CLASSES)
def test_headings_are_used_and_short(cls: type[BaseModel]) -> None:
    """Every heading has settings, and none so many that it says nothing."""
    tables = {name.rpartition(".")[0] for name, _ in base.fields(cls)}
    for table in tables:
        found = [h for name, _, h in base.fields_under_headings(cls) if name.rpartition(".")[0] == table]
        assert not any(found) or all(0 < found.count(heading) <= 16 for heading in set(found))


@pytest.mark.parametrize(
    ("classes", "headings"),
    [([TrainConfig], TrainConfig.HEADINGS), ([GenerateConfig, ScoreConfig, EvaluateConfig], EngineConfig.HEADINGS)],
)
def test_every_setting_has_a_heading_and_every_heading_a_setting(
    classes: list[type[BaseModel]], headings: tuple[str, ...]
) -> None:
    found = [heading for cls in classes for _, _, heading in base.fields_under_headings(cls)]
    assert set(found) == set(headings)


def test_a_table_of_iterate_has_its_headings() -> None:
    text = base.to_toml(IterateConfig())
    assert f"# ---- {TrainConfig.HEADINGS[0]} ----" in text.partition("[train]")[2]
    assert f"# ---- {EngineConfig.HEADINGS[0]} ----" in text.partition("[evaluate]")[2]


@pytest.mark.parametrize("name", [n for n, f in base.fields(TrainConfig) if f.annotation is float])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_refused(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):  # inf has no place in a saved recipe, and nan is never equal to itself
        base.load(TrainConfig, None, {name: value})


def test_nan_is_refused_where_no_bound_refuses_it() -> None:
    with pytest.raises(UsageError, match="pass_reward"):
        base.load(EvaluateConfig, None, {"pass_reward": "nan"})


@pytest.mark.parametrize(
    ("cls", "flags", "sentence"),
    [
        (TrainConfig, {"loss_type": ["sigmoid,nll"]}, "(--loss-type sigmoid --loss-type nll)"),
        (TrainConfig, {"loss_type": ["sigmoid", "ipo, nll"]}, 'in a recipe write ["ipo", "nll"]'),
        (TrainConfig, {"report_to": ["wandb,mlflow"]}, "(--report-to wandb --report-to mlflow)"),
        (GenerateConfig, {"rewards": ["length,repetition"]}, "(--rewards length --rewards repetition)"),
        (IterateConfig, {"train.loss_type": ["sigmoid,nll"]}, "(--train.loss-type sigmoid --train.loss-type nll)"),
        (TrainConfig, {"loss_type": ["sft"]}, "'sft' is here 'nll'"),
        (TrainConfig, {"loss_type": ["ipo", "dpo"], "loss_weights": ["1", "1"]}, "'dpo' is here 'sigmoid'"),
        (IterateConfig, {"train.loss_type": ["wpo"]}, "'wpo' is here 'sigmoid' with use_weighting"),
    ],
)
def test_several_values_in_one_text_and_losses_by_other_names(
    cls: type[BaseModel], flags: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        base.load(cls, None, flags)
    assert sentence in caught.value.message
    assert caught.value.message.count("command line: ") == 1


def test_an_empty_list_where_one_value_is_needed_is_told() -> None:
    with pytest.raises(UsageError, match="at least 1 item"):
        load(TrainConfig, "loss_type = []\nloss_weights = []")


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *(
            (TrainConfig, n)
            for n, f in base.fields(TrainConfig)
            if base.PATH in f.metadata and base.REMOTE not in f.metadata
        ),
        (GenerateConfig, "model"),
        (EvaluateConfig, "model"),
        (BuildPairsConfig, "contamination"),
        (IterateConfig, "evaluate.chat_template"),
    ],
)
def test_an_address_is_never_taken_for_a_path(cls: type[BaseModel], name: str) -> None:
    """Path("hf://x") is hf:/x, and an error about that helps nobody."""
    url = "hf://datasets/o/n@v1/a.jsonl"
    several = typing.get_origin(dict(base.fields(cls))[name].annotation) is tuple
    with pytest.raises(UsageError, match=f"{name} = {url} is an address") as caught:
        base.load(cls, None, {name: [url] if several else url})
    assert "may be datasets of the hub" in caught.value.hint


def test_addresses_that_are_read_as_such() -> None:
    assert base.load(ScoreConfig, None, {"inputs": ["hf://datasets/o/n@v1/a.jsonl"]}).inputs[0].startswith("hf://")
    judge = '[reward_settings.j]\nkind = "judge"\nmodel = "m"\ncriteria = "c"\nbase_url = "https://h.example/v1"'
    assert load(GenerateConfig, judge).reward_settings["j"].base_url == "https://h.example/v1"
    with pytest.raises(UsageError, match=r"reward_settings\.s\.schema_file = hf://x is an address"):
        load(GenerateConfig, '[reward_settings.s]\nkind = "json_schema"\nschema_file = "hf://x"')


@pytest.mark.parametrize(
    ("settings_", "rate"), [({}, 1e-5), ({"load_in_4bit": True}, 1e-5), ({"tuning": "full"}, 1e-6)]
)
def test_the_learning_rate_depends_on_what_is_tuned(settings_: dict[str, Any], rate: float) -> None:
    config = TrainConfig(**settings_)
    assert (config.learning_rate, config.resolved.learning_rate) == (0.0, rate)
    assert TrainConfig(learning_rate=0.3, **settings_).resolved.learning_rate == 0.3
    assert base.load(TrainConfig, None, base.dump(config.resolved)) == config.resolved


def test_precedence_is_defaults_then_recipe_then_flags() -> None:
    recipe = "beta = 0.2\nlora_r = 4\n"
    loaded = load(TrainConfig, recipe, {"beta": "0.3"})
    assert (loaded.beta, loaded.lora_r, loaded.lora_alpha) == (0.3, 4, TrainConfig().lora_alpha)
    nested_recipe = "rounds = 3\n[train]\nbeta = 0.2\nlora_r = 4\n"
    both = load(IterateConfig, nested_recipe, {"train.beta": "0.3", "generate.seed": "9"})
    assert (both.rounds, both.train.beta, both.train.lora_r, both.generate.seed) == (3, 0.3, 4, 9)


def test_no_recipe_and_no_flags_are_the_defaults() -> None:
    assert all(base.load(cls, None, {}) == cls() for cls in CLASSES)


def test_all_errors_come_at_once_with_file_name_and_suggestion() -> None:
    recipe = 'num_sampels = 4\nengine = "transfomers"\ntemperature = 3\nseed = "x"\n'
    with pytest.raises(UsageError) as caught:
        load(GenerateConfig, recipe)
    message = caught.value.message
    assert message.count("recipe.toml: ") == 4
    assert "unknown setting 'num_sampels' (did you mean 'num_samples'?)" in message
    assert (
        "engine = 'transfomers' is not one of 'vllm', 'transformers', 'server', 'fake' (did you mean 'transformers'?)"
        in message
    )
    assert "temperature = 3: Input should be less than or equal to 2" in message
    assert "seed = 'x': " in message
    assert "prefpipe config generate" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("cls", "text", "words"),
    [
        (
            TrainConfig,
            'loss_type = ["sigmoid", "sigmod"]\nloss_weights = [1, 1]',
            "loss_type.1 = 'sigmod' is not one of",
        ),
        (TrainConfig, 'loss_type = ["sigmod"]', "(did you mean 'sigmoid'?)"),
        (IterateConfig, '[generate]\nengine = "vlm"', "generate.engine = 'vlm' is not one of 'vllm'"),
        (
            IterateConfig,
            "[generate]\nnum_sample = 3",
            "unknown setting 'generate.num_sample' (did you mean 'num_samples'?)",
        ),
        (IterateConfig, "[evaluat]\nseed = 3", "unknown setting 'evaluat'"),
        (GenerateConfig, 'rewards = ["short_sentense"]', "(did you mean 'short_sentence'?)"),
        (EvaluateConfig, 'reward = "nothing_like_it"', "a table [reward_settings.NAME] or your own 'module:function'"),
        (
            IterateConfig,
            '[evaluate.reward_settings.mine]\nkind = "length"\nunit = "word"',
            "evaluate.reward_settings.mine.unit = 'word' is not one of 'words', 'characters', 'tokens'",
        ),
        (
            GenerateConfig,
            '[reward_settings.length]\nkind = "length"\nmaxx = 3',
            "unknown setting 'reward_settings.length.maxx' (did you mean 'max'?)",
        ),
        (GenerateConfig, '[reward_settings.x]\nkind = "lenght"', "reward_settings.x.kind = 'lenght' is not one of"),
        (GenerateConfig, "[reward_settings.x]\nmin = 3", "reward_settings.x: `kind` is missing"),
        (GenerateConfig, "reward_settings = 3", "reward_settings = 3: Input should be a valid dictionary"),
        (TrainConfig, 'loss_type = ["sigmoid", "nll"]', "2 losses but 1 loss_weights"),
        (IterateConfig, "[generate.deeper]\nx = 1", "unknown setting 'generate.deeper'"),
    ],
)
def test_sentences(cls: type[BaseModel], text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(cls, text)
    assert words in caught.value.message


def test_errors_of_flags_name_the_command_line() -> None:
    with pytest.raises(UsageError, match="command line: limit = '-1'"):
        base.load(GenerateConfig, None, {"limit": "-1"})


@pytest.mark.parametrize(
    ("cls", "flags"), [(TrainConfig, {"loss_type": ["sigmoid", "nll"]}), (IterateConfig, {"generate.model": "x"})]
)
def test_an_error_of_several_settings_does_not_print_all_of_them(cls: type[BaseModel], flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        base.load(cls, None, flags)
    assert " = {" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('loss_type = "sigmoid"', r"""loss_type = 'sigmoid' is not a list: write \["sigmoid"\]"""),
        ("loss_weights = 0.5", r"loss_weights = 0.5 is not a list: write \[0.5\]"),
        ("loss_weights = [0.5, -0.5]", r"loss_weights.1 = -0.5: .*greater than or equal to 0"),
    ],
)
def test_one_value_in_place_of_a_list_and_a_weight_below_0(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(TrainConfig, text)


def test_a_suggestion_is_a_setting_of_the_same_table() -> None:
    with pytest.raises(UsageError) as caught:
        load(IterateConfig, "[generate]\nlearning_rat = 1e-4\n")
    assert "learning_rate'" not in caught.value.message  # a setting of [train]: [generate] would refuse it as well


@pytest.mark.parametrize("text", ["seed = 1\nbeta = \n", "seed = 1\nseed = 2\n", "seed = 1\nx y\n"])
def test_a_toml_error_names_file_and_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"recipe\.toml: .*line 2"):
        load(TrainConfig, text)


def test_a_json_error_names_file_and_line() -> None:
    with pytest.raises(UsageError, match=r"recipe\.json: .*line 2"):
        load(TrainConfig, '{"seed": 1,\n}', suffix=".json")


def test_a_setting_that_stands_twice_is_refused_in_json_too() -> None:
    with pytest.raises(DataError, match=r"recipe\.json cannot be read: the key 'seed' stands twice"):
        load(TrainConfig, '{"config": {"seed": 1, "beta": 0.1, "seed": 2}}', suffix=".json")


@pytest.mark.parametrize("text", ["[1, 2]", "3", '{"config": 3}', "null"])
def test_json_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"recipe\.json"):
        load(TrainConfig, text, suffix=".json")


def test_a_value_where_a_table_belongs_is_refused_with_and_without_flags() -> None:
    with pytest.raises(UsageError, match="generate = 3"):
        load(IterateConfig, "generate = 3")
    with pytest.raises(UsageError, match="generate"):
        load(IterateConfig, "generate = 3", {"generate.seed": "1"})


def test_a_recipe_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes('model = "größe"'.encode("latin-1"))
    with pytest.raises(DataError, match=r"r\.toml is not UTF-8 text"):
        base.load(TrainConfig, tmp_path / "r.toml", {})


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"absent\.toml does not exist"):
        base.load(TrainConfig, tmp_path / "absent.toml", {})


def test_loading_does_not_change_the_flags() -> None:
    flags = {"train.beta": "0.3", "rounds": "1"}
    base.load(IterateConfig, None, flags)
    assert flags == {"train.beta": "0.3", "rounds": "1"}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_is_documented(cls: type[BaseModel]) -> None:
    for name, field in base.fields(cls):
        assert field.description, name
        assert field.description.endswith((".", ").")), name


@pytest.mark.parametrize("cls", CLASSES)
def test_configs_are_frozen_and_their_recipe_names_every_setting(cls: type[BaseModel]) -> None:
    assert cls.model_config.get("frozen")
    assert cls.model_config.get("extra") == "forbid"
    written = tomllib.loads(base.to_toml(cls()))
    flat = {f"{k}.{inner}" for k, v in written.items() if isinstance(v, dict) for inner in v}
    flat |= {k for k, v in written.items() if not isinstance(v, dict) or not v}
    assert flat == {name for name, _ in base.fields(cls)}


def test_command_names_are_those_of_the_command_line() -> None:
    assert {base.command_name(cls) for cls in CLASSES} == set(STAGES)
    assert all(base.command_name(cls) == name for name, cls in SETTINGS.items())


def test_suggestion() -> None:
    assert base.suggestion("trian", ["train", "generate"]) == " (did you mean 'train'?)"
    assert base.suggestion("zzz", ["train", "generate"]) == ""


@pytest.mark.parametrize("cls", [GenerateConfig, ScoreConfig, EvaluateConfig])
def test_servers_go_with_the_engine_that_asks_them(cls: Any) -> None:
    far = load(cls, 'engine = "server"\nbase_urls = ["http://a:8000/v1/", "http://b:8000"]')
    assert far.base_urls == ("http://a:8000/v1", "http://b:8000")
    assert "base_urls" not in base.result_fields(far)
    for text, words in [
        ('engine = "server"', 'engine = "server" needs base_urls'),
        ('base_urls = ["http://a:8000"]', 'base_urls is read by engine = "server"'),
        ('engine = "server"\nbase_urls = ["a:8000"]', "must start with http"),
        ('engine = "server"\nbase_urls = ["http://a"]\napi_key_env = "sk-1234567890"', "must be the name of an envi"),
    ]:
        with pytest.raises(UsageError, match=words):
            load(cls, text)
