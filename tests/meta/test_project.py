"""The project is what it says: mirrors, registries, recipes, licences of data, and no paths of one machine."""

import hashlib
import re
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from prefpipe.cli import STAGES
from prefpipe.config import base, shared
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.iterate import SCHEDULES, IterateConfig
from prefpipe.config.losses import LOSSES, LossSettings, readers
from prefpipe.config.names import known
from prefpipe.config.rewards import KINDS
from prefpipe.config.score import ScoreConfig
from prefpipe.config.stops import StopRule, StopSettings
from prefpipe.config.train import TrainConfig
from prefpipe.engines import ENGINES
from prefpipe.rewards import REWARDS
from tests.conftest import ROOT

PACKAGE = ROOT / "prefpipe"
WITHOUT_MIRROR = {
    *("__main__.py", "forward/dequantize.py", "engines/base.py", "engines/pooling.py", "rewards/base.py"),
    "rewards/sandbox/__main__.py",  # a script: test_code_tests
    "inference/filling.py",  # inference/test_task.py
    *(f"inference/pool_{name}.py" for name in ("messages", "worker", "driver", "leases")),  # inference/test_pool.py
    "inference/pool_processes.py",  # faults/test_worker_kills.py
    "inference/ray_tasks.py",  # inference/test_pool_ray.py
    *(
        f"config/{name}.py" for name in ("engine", "evaluate", "generate", "plan", "score", "shared", "stops")
    ),  # config/test_base.py
}
RECIPES = sorted((ROOT / "stages").rglob("*.toml"))
RECIPE_CASES = [pytest.param(p, id=str(p.relative_to(ROOT / "stages"))) for p in RECIPES]


def modules() -> list[str]:
    return sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def recipe_class(path: Path) -> type:
    return STAGES[path.relative_to(ROOT / "stages").parts[0]][0]


@pytest.mark.parametrize("module", sorted(set(modules()) - WITHOUT_MIRROR))
def test_every_module_has_a_test_file(module: str) -> None:
    path = Path(module)
    mirror = ROOT / "tests" / path.with_name(f"test_{path.name}")
    assert mirror.is_file(), f"write {mirror.relative_to(ROOT)}"


def test_exceptions_from_the_mirror_exist() -> None:
    assert set(modules()) >= WITHOUT_MIRROR


def test_registries_and_settings_name_the_same_things() -> None:
    assert set(shared.REWARD_NAMES) == set(REWARDS)
    (loss_choice, _) = get_args(TrainConfig.model_fields["loss_type"].annotation)
    assert set(known(loss_choice.__metadata__)) == set(LOSSES)
    for cls in (GenerateConfig, EvaluateConfig, ScoreConfig):
        assert set(get_args(cls.model_fields["engine"].annotation)) == set(ENGINES)


def test_the_page_of_losses_has_every_loss_and_what_it_alone_reads() -> None:
    page = (ROOT / "docs" / "losses.md").read_text()
    settings = [s for s in LossSettings.model_fields if len(readers(s)) == 1]
    assert [name for name in (*LOSSES, *settings) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", ["dpop", "rdpo", "exo_pair", "odpo", "plackett_luce", "apo_zero_unpaired"])
def test_a_loss_lives_in_two_files(name: str) -> None:
    """Its row in the table and its function; settings of it have its name in theirs."""
    places = [module for module in modules() if re.search(rf"\b{name}", (PACKAGE / module).read_text())]
    assert len(places) == 2, places
    assert places[0] == "config/losses.py"
    assert places[1].startswith("stages/train/losses/")


@pytest.mark.parametrize("cls", [GenerateConfig, ScoreConfig, BuildPairsConfig, TrainConfig, EvaluateConfig])
def test_every_setting_is_read_outside_of_the_settings(cls: type) -> None:
    code = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.parent.name != "config")
    for name, _ in base.fields(cls):
        assert re.search(rf"\.{name}\b|\"{name}\"", code), f"{cls.__name__}.{name} is documented but never used"


def test_iterate_reads_its_own_settings() -> None:
    code = "\n".join(path.read_text() for path in (PACKAGE / "stages" / "iterate").glob("*.py"))
    own = {name for name in IterateConfig.model_fields if name not in SCHEDULES}
    assert [name for name in sorted(own) if f"config.{name}" not in code] == []
    assert [name for name in StopSettings.model_fields if f"settings.{name}" not in code] == [
        *(f"{rule}_rounds" for rule in get_args(StopRule))
    ]  # read by the name of the rule


@pytest.mark.parametrize("path", RECIPE_CASES)
def test_a_recipe_loads_and_lists_only_what_differs_from_the_defaults(path: Path) -> None:
    cls = recipe_class(path)
    loaded = base.dump(base.load(cls, path, {}))
    defaults = base.dump(cls())
    for stage in (loaded, *(v for v in loaded.values() if isinstance(v, dict))):
        for name, table in (stage.get("reward_settings") or {}).items():  # each against the defaults of its kind
            place = defaults if stage is loaded else defaults[next(k for k, v in loaded.items() if v is stage)]
            place["reward_settings"][name] = base.dump(KINDS[table["kind"]]()) | {"kind": None}

    def same(values: dict[str, object], given: dict[str, object], standard: dict[str, object], at: str) -> list[str]:
        found: list[str] = []
        for key, value in values.items():
            if isinstance(value, dict):
                found += same(value, given[key], standard[key], f"{at}{key}.")  # type: ignore[arg-type]  # nested tables
            elif given[key] == standard[key]:
                found.append(f"{at}{key}")
        return found

    assert same(base.read_recipe(path), loaded, defaults, "") == []


@pytest.mark.parametrize("path", RECIPE_CASES)
def test_the_header_of_a_recipe_gives_purpose_and_command(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = path.relative_to(ROOT / "stages").parts[0]
    assert any(f"prefpipe {command} {path.relative_to(ROOT)}" in line for line in header), "no command in the header"


@pytest.mark.parametrize("path", RECIPE_CASES)
def test_files_that_a_recipe_names_exist(path: Path) -> None:
    for value in re.findall(r'"((?:data|stages)/[^":]+)[":]', path.read_text()):
        assert (ROOT / value).is_file(), value


def test_there_are_recipes_and_they_are_toml() -> None:
    assert RECIPES
    others = [
        p.name
        for p in (ROOT / "stages").rglob("*")
        if p.is_file() and p.suffix not in (".toml", ".md") and p.name != "schema.json"
    ]
    assert others == []


def test_the_data_card_has_the_digests_and_row_counts_of_its_files() -> None:
    rows = re.findall(
        r"\| `([^`]+)` \| (\d+)[^|]*\|.*\| `([0-9a-f]{64})` \|", (ROOT / "data" / "README.md").read_text()
    )
    listed = {name: (int(count), digest) for name, count, digest in rows}
    shipped = [p for p in (ROOT / "data").iterdir() if p.suffix in (".jsonl", ".parquet", ".csv")]
    assert set(listed) == {p.name for p in shipped}
    for path in shipped:
        content = path.read_bytes()
        assert listed[path.name] == (len(content.splitlines()), hashlib.sha256(content).hexdigest())


def test_no_file_names_a_place_on_someones_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    place = re.compile(rb"(?<![\w.:/-])/(?:home|Users|root|work)/")
    found = [n for n in listed.stdout.splitlines() if (ROOT / n).is_file() and place.search((ROOT / n).read_bytes())]
    assert found == []
