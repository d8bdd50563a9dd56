"""Divergences with log-probs that are known: the fake engine shifts each by 1/8 when the adapter is off."""

import math
from pathlib import Path

import pytest

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.errors import DataError, IdentityError
from prefpipe.inference.task import read_task
from prefpipe.runs import store
from prefpipe.schemas import RefLogps
from prefpipe.stages.evaluate import kl
from tests.conftest import Call, Write
from tests.stages.evaluate.cases import config, prompts_file, rows_of, run, summary
from tests.tiny import make_adapter, make_gpt2

SHIFT = 0.125


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "a", seed=3)


@pytest.fixture(scope="module")
def other_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "b", seed=4)


def test_the_divergence_to_the_model_without_its_adapter(
    tiny_model: Path, adapter: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every log-ratio is 1/8: k1 is 1/8 per token, k3 is e^-1/8 - 1 + 1/8; per sequence they are times its length. The
    engine that samples scores too."""
    settings = config(tiny_model, prompts_file(write, 5), adapter=str(adapter), kl_to=("base",))
    (found,) = run(settings, tmp_path / "e")["totals"]["kl"]
    k3 = math.exp(-SHIFT) - 1 + SHIFT
    assert found["to"] == "base"
    for end in ("", "_low", "_high"):
        assert found["per_token"][f"k1{end}"] == pytest.approx(SHIFT, abs=1e-6)
        assert found["per_token"][f"k3{end}"] == pytest.approx(k3, abs=1e-6)
    sampled = [r for r in rows_of(tmp_path / "e") if r.decoding == "sampled"]
    length = sum(len(r.token_ids) for r in sampled) / len(sampled)
    assert found["per_sequence"]["k1"] == pytest.approx(SHIFT * length, rel=1e-5)
    assert found["per_sequence"]["k1_low"] < SHIFT * length < found["per_sequence"]["k1_high"]
    assert found["per_sequence"]["k3"] == pytest.approx(k3 * length, rel=1e-4)
    assert capsys.readouterr().err.count("starting engine") == 1
    (folder,) = (tmp_path / "e" / "kl").iterdir()
    rows = store.read_dataset(tmp_path / "e", f"kl/{folder.name}", RefLogps).to_pylist()
    assert {r["completion_id"] for r in rows} == {r.completion_id for r in sampled}
    assert {r["reference"] for r in rows} == {found["policy"]} == {sampled[0].policy.partition("+")[0]}


def test_a_divergence_that_is_asked_for_later_samples_nothing(
    tiny_model: Path, adapter: Path, other_adapter: Path, write: Write, tmp_path: Path
) -> None:
    """To the policy of another adapter and to another model; the fake engine gives them the same log-probs."""
    path = prompts_file(write, 5)
    first = run(config(tiny_model, path, adapter=str(adapter)), tmp_path / "e")
    later = config(tiny_model, path, adapter=str(adapter), kl_to=(str(other_adapter), str(tiny_model), str(adapter)))
    found = run(later, tmp_path / "e")
    assert [k["to"] for k in found["totals"]["kl"]] == list(later.kl_to)
    assert len({k["policy"] for k in found["totals"]["kl"]}) == 3
    assert [k["per_token"]["k1"] for k in found["totals"]["kl"]] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["totals"]["sampled"] == first["totals"]["sampled"]
    assert len(list((tmp_path / "e" / "kl").iterdir())) == 2  # nothing is scored for the policy itself
    part = next((tmp_path / "e" / "kl").glob("*/part-00001.parquet"))
    part.unlink()
    assert run(later, tmp_path / "e") == found


def test_a_model_with_other_tokens_is_refused(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    gpt2 = make_gpt2(tmp_path / "gpt2", context=64)
    settings = config(tiny_model, prompts_file(write, 2))
    assert kl.read(str(gpt2), settings, read_task(settings, settings.reward)).policy.directory == gpt2
    text = (gpt2 / "tokenizer.json").read_text()
    (gpt2 / "tokenizer.json").write_text(text.replace('"<|im_end|>"', '"<|over|>"'))
    config_text = (gpt2 / "tokenizer_config.json").read_text()
    (gpt2 / "tokenizer_config.json").write_text(config_text.replace("<|im_end|>", "<|over|>"))
    with pytest.raises(IdentityError, match="the same id is another token there"):
        kl.read(str(gpt2), settings, read_task(settings, settings.reward))


def test_samples_of_another_distribution_are_said(
    call: Call, tiny_model: Path, adapter: Path, write: Write, tmp_path: Path
) -> None:
    common = ("evaluate", "--model", tiny_model, "--adapter", adapter, "--prompts", prompts_file(write, 2))
    common = (*common, "--engine", "fake", "--reward", "length", "--kl-to", "base")
    for out, flags, said in (("a", (), False), ("b", ("--temperature", "0.7"), True), ("c", ("--top-p", "0.9"), True)):
        done = call(*common, *flags, "--out", tmp_path / out)
        assert (done.code, "samples of another distribution" in done.stderr) == (0, said), done.stderr
        assert "KL to base (k3, nats): per token 0.007 [0.007, 0.007]" in summary(tmp_path / out)


def test_answers_of_an_older_version_have_no_log_probs(
    tiny_model: Path, adapter: Path, write: Write, tmp_path: Path
) -> None:
    settings = config(tiny_model, prompts_file(write, 2), adapter=str(adapter))
    task = read_task(settings, settings.reward)
    run(settings, tmp_path / "e")
    answers = _without_logps(settings, tmp_path / "e")
    with pytest.raises(DataError, match="no sampled answer has log-probs"):
        kl.totals(answers, kl.read(str(adapter), settings, task))


def _without_logps(settings: EvaluateConfig, out: Path) -> "kl.Answers":
    task = read_task(settings, settings.reward)

    class Old(kl.Answers):
        def rows(self, index: int):  # type: ignore[no-untyped-def]
            found = super().rows(index)
            for row in found:
                object.__setattr__(row, "token_logps", None)
            return found

    return Old(store.Run(out, "evaluate", "", {}, {"shard_rows": 2}, ""), task, "", 1, 3)
