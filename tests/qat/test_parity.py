"""The comparison of two models, and of weights with the grid."""

import copy

import pytest
import torch

from kconvert_qat import QATConfig, prepare
from kconvert_qat.parity import changed_share, compare, sampled_codes, weight_sqnr


def test_a_model_agrees_with_itself(tiny, ids):
    model = tiny()
    parity = compare(model, copy.deepcopy(model), [ids])
    assert (parity.agreement.max_abs, parity.agreement.top1, parity.sqnr, parity.experts) == (0, 1, None, 1)


def test_a_prepared_model_is_some_way_off_and_routes_other_tokens(tiny, ids):
    model, prepared = tiny(), tiny()
    prepare(prepared)
    parity = compare(model, prepared, [ids, ids])
    assert 0 < parity.sqnr < 40
    assert 0.5 < parity.cosine < 1
    assert parity.agreement.kl > 0
    assert 0.5 < parity.experts <= 1


def test_the_grid_of_gaussian_weights_is_some_20_db_below_them_and_nothing_below_its_own(tiny):
    check_measures(prepare(tiny()), 18, 23)


@pytest.mark.parametrize(("grid", "least", "most"), [("mxfp4", 16, 22), ("nvfp4", 18, 24), ("fp8-block", 28, 36)])
def test_other_grids_are_measured_alike(tiny, family, grid, least, most):
    check_measures(prepare(tiny(family), QATConfig(grid=grid)), least, most)


def check_measures(covered, least, most):
    assert all(least < ratio < most for ratio in weight_sqnr(covered).values())
    before = sampled_codes(covered)
    assert set(changed_share(before, sampled_codes(covered)).values()) == {0.0}
    with torch.no_grad():
        for weight in covered.weights:
            weight.tensor.neg_()
    assert all(share > 0.5 for share in changed_share(before, sampled_codes(covered)).values())
