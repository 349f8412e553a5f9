"""The metrics against their definitions, in numpy and with all values at hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kconvert.proof.parity.metrics import Errors, Limits, Spread, measure


def pair(seed: int, rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of all sizes, and the same with errors on about half of them."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, cols, generator=generator) * 10.0 ** torch.randint(-6, 4, (rows, 1), generator=generator)
    e = a * torch.randn(rows, cols, generator=generator) * 0.1 * (torch.rand(rows, cols, generator=generator) < 0.5)
    return a.to(dtype), (a.to(dtype).float() + e).to(torch.bfloat16)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)
def test_every_metric_is_what_its_formula_says(seed: int, rows: int, cols: int, dtype: str) -> None:
    expected, found = pair(seed, rows, cols, getattr(torch, dtype))
    a, b = expected.double().numpy(), found.double().numpy()
    e = b - a

    errors, by_sqnr = measure(expected, found)

    assert errors.elements == a.size
    assert errors.different == np.count_nonzero(e)
    assert errors.max_abs == np.abs(e).max()
    assert errors.max_relative == pytest.approx((np.abs(e).max(1) / np.abs(a).max(1)).max())
    assert errors.frobenius == pytest.approx(np.linalg.norm(e) / np.linalg.norm(a))
    assert errors.cosine == pytest.approx(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
    noisy = np.abs(e).max(1) > 0
    assert sum(by_sqnr.values()) == noisy.sum()
    if errors.different:
        assert errors.sqnr == pytest.approx(20 * math.log10(np.linalg.norm(a) / np.linalg.norm(e)))
        assert errors.worst is not None
        assert abs(e[errors.worst.row, errors.worst.col]) == errors.max_abs
        assert (errors.worst.expected, errors.worst.found) == (
            a[errors.worst.row, errors.worst.col],
            b[errors.worst.row, errors.worst.col],
        )
    else:
        assert errors.sqnr is None


@pytest.mark.parametrize("power", [-130, -80, 0, 80, 100])
def test_figures_hold_for_values_of_any_size(power: int) -> None:
    """Squares of the smallest and the largest are beyond f32."""
    expected, found = (values.double() * 2.0**power for values in pair(3, 8, 96))
    expected, found = expected.bfloat16(), found.bfloat16()
    a, b = expected.double().numpy(), found.double().numpy()
    errors, _ = measure(expected, found)
    assert errors.max_abs == np.abs(b - a).max()
    assert errors.frobenius == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert errors.cosine == pytest.approx(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))


def test_the_largest_error_is_exact_where_f32_rounds_the_difference() -> None:
    expected = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).bfloat16()
    found = torch.tensor([[1.0 + 2.0**-30, 65537.0], [-(2.0**-20), 65537.0 + 2.0**-7]])
    errors, _ = measure(expected, found)
    assert errors.max_abs == 65536.0 + 2.0**-7
    assert errors.worst is not None
    assert (errors.worst.row, errors.worst.col) == (1, 1)


def test_pieces_put_together_are_the_whole() -> None:
    expected, found = pair(1, 64, 48)
    whole, rows = measure(expected, found)

    parts = [measure(expected[first : first + 10], found[first : first + 10], first) for first in range(0, 64, 10)]

    total = sum((errors for errors, _ in parts), Errors())
    assert (total.worst, total.max_relative, total.different) == (whole.worst, whole.max_relative, whole.different)
    assert total.noise == pytest.approx(whole.noise)
    assert total.cosine == pytest.approx(whole.cosine)
    assert sum((counts for _, counts in parts), start=type(rows)()) == rows


def test_equal_values_have_no_error() -> None:
    values = torch.randn(8, 64).bfloat16()
    errors, rows = measure(values, values.clone())
    assert (errors.different, errors.max_abs, errors.sqnr, errors.cosine, errors.frobenius) == (0, 0, None, 1, 0)
    assert not rows
    assert errors.signal == pytest.approx(float(values.double().square().sum()))


def test_zeros_are_equal_to_zeros_and_anything_else_is_not() -> None:
    zeros, ones = torch.zeros(2, 4).bfloat16(), torch.ones(2, 4).bfloat16()
    assert measure(zeros, zeros)[0].cosine == 1
    errors, _ = measure(zeros, ones)
    assert errors.max_relative == 1
    assert errors.sqnr is not None
    assert errors.sqnr < -100


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1, 2], ids=["expected", "found", "both"])
def test_elements_that_are_not_finite_are_counted_and_spoil_nothing(value: float, side: int) -> None:
    expected, found = pair(2, 4, 32)
    clean = measure(torch.cat((expected[:, :5], expected[:, 6:]), 1), torch.cat((found[:, :5], found[:, 6:]), 1))[0]
    if side != 1:
        expected[:, 5] = value
    if side != 0:
        found[:, 5] = value

    errors, _ = measure(expected, found)

    assert (errors.nonfinite, errors.elements) == (4, 4 * 31)
    assert (errors.max_abs, errors.different) == (clean.max_abs, clean.different)
    assert errors.sqnr == pytest.approx(clean.sqnr)


def test_limits_name_the_metric_and_both_numbers() -> None:
    errors, _ = measure(torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, 1.5]]))
    assert Limits({"sqnr": 12.0}, {"max_abs": 0.5}).missed(errors) is None
    assert Limits({"sqnr": 13.0}).missed(errors) == "SQNR 12.04 dB is under the limit of 13"
    assert Limits({}, {"max_abs": 0.4}).missed(errors) == "largest error 0.5 is over the limit of 0.4"
    assert Limits({"sqnr": 1e9}).missed(Errors(4, signal=1.0)) is None


def test_limits_of_the_user_replace_the_usual_ones_of_the_same_metric() -> None:
    both = Limits({"sqnr": 20.0}, {"max_abs": 1.0}) | Limits({"sqnr": 30.0, "cosine": 0.9})
    assert both == Limits({"sqnr": 30.0, "cosine": 0.9}, {"max_abs": 1.0})


def test_spreads_keep_codes_that_never_occur() -> None:
    spread = Spread() + Spread(codes=type(Spread().codes)({1.0: 0, 2.0: 3}))
    assert dict((spread + spread).codes) == {1.0: 0, 2.0: 6}
