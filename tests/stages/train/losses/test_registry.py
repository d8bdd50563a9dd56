"""A loss is found by its name, reads what its row of the table says, and adds up with others."""

import inspect

import pytest

from prefpipe.config.losses import LOSSES, Kind, LossSettings, Objective
from prefpipe.stages.train.losses import listwise, pairwise, registry, unpaired
from prefpipe.stages.train.losses.batch import LossBatch
from tests.stages.train.cases import A, Recorder, beta, labels, objective, pairs, ranks

BATCHES: dict[Kind, LossBatch] = {
    "pairs": pairs(A, prob=0.8, gap=2.0),
    "labels": labels((-1.0, -2.0, True), (-1.0, -2.0, False)),
    "groups": ranks([1.0, 2.0]),
}
READ_ELSEWHERE = {"use_weighting", "nll_scope", "kl_bank_size", "kl_rows"}  # by what makes batches and weights


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_function_of_its_name_in_the_module_of_its_rows(name: str):
    module = {"pairs": pairwise, "labels": unpaired, "groups": listwise}[LOSSES[name].kind]
    assert inspect.getdoc(getattr(module, name))
    found = registry.loss(name, BATCHES[LOSSES[name].kind], beta(0.1, label_smoothing=0.1))
    assert found.shape == (2,) if LOSSES[name].kind == "labels" else (1,)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_the_settings_that_its_row_says(name: str):
    """Else a setting would do nothing, or be refused although it does something."""
    watched = [Recorder(beta(0.1, label_smoothing=0.1)), Recorder(beta(0.1, label_smoothing=0.1, ld_alpha=0.5))]
    for recorder in watched:
        registry.loss(name, BATCHES[LOSSES[name].kind], recorder)  # type: ignore[arg-type]  (it stands for settings)
    assert set.union(*(r.read for r in watched)) | ({"simpo_gamma_beta_ratio"} & set(LOSSES[name].reads)) == (
        set(LOSSES[name].reads) - READ_ELSEWHERE
    )


def test_settings_that_a_row_reads_exist():
    assert {setting for loss in LOSSES.values() for setting in loss.reads} == set(LossSettings.model_fields)


def test_combine_adds_weighted_losses():
    """DPO + NLL of A at beta 0.1: 0.403186 + 2 = 2.403186; with weights 0.5 and 3: 0.201593 + 6."""
    both, other = (objective(beta(0.1), sigmoid=w, nll=v) for w, v in ((1.0, 1.0), (0.5, 3.0)))
    assert float(registry.combine(both, pairs(A))) == pytest.approx(2.403186, abs=1e-6)
    assert float(registry.combine(other, pairs(A))) == pytest.approx(6.201593, abs=1e-6)
    with pytest.raises(ValueError, match="zip"):
        registry.combine(Objective(("sigmoid", "nll"), (1.0,), beta(0.1)), pairs(A))
