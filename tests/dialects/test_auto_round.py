"""What is read in auto-round's dialect."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kconvert import KconvertError
from kconvert.dialects import QuantizationConfig, read_quantization
from kconvert.formats.base import Scheme

# As auto-round 0.16 writes it.
WRITTEN = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "iters": 0,
    "autoround_version": "0.16.1",
    "block_name_to_quantize": "model.layers",
}


def read(**changes: Any) -> QuantizationConfig:
    return read_quantization({"quantization_config": {**WRITTEN, **changes}})


def scheme(module: str = "model.layers.0.q_proj", **changes: Any) -> Scheme:
    found = read(**changes).scheme_for(module)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("packing", "format"),
    [
        ("auto_round:auto_gptq", "auto-round"),
        ("auto_round:gptq", "auto-round"),
        ("auto", "auto-round"),
        (None, "auto-round"),
        ("auto_round:auto_gptq:exllamav2", "auto-round"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:exllamav2", "gptq_v2"),
        ("auto_round:tritonv2_zp", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:awq", "awq"),
    ],
)
def test_integers_lie_as_the_packing_says(packing: str | None, format: str) -> None:
    assert scheme(packing_format=packing).format == format
    assert scheme(packing_format=packing, data_type=None).format == format


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integers_of_all_widths_are_read_in_gptq_s_packing(bits: int) -> None:
    assert scheme(bits=bits).num_bits == bits
    if bits != 4:
        with pytest.raises(KconvertError, match=f"bits is {bits}; 4 belongs there"):
            scheme(bits=bits, packing_format="auto_round:auto_awq")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data_type": "mx_fp", "bits": 4, "group_size": 32}, ("mxfp4-pack-quantized", "group", 32)),
        ({"data_type": "mx_fp_rceil", "bits": 8, "group_size": 32}, ("mxfp8-quantized", "group", 32)),
        ({"data_type": "nv_fp", "bits": 4, "group_size": 16}, ("nvfp4-pack-quantized", "tensor_group", 16)),
        ({"data_type": "fp", "bits": 8, "group_size": -1}, ("float-quantized", "channel", None)),
        ({"data_type": "fp", "bits": 8, "group_size": 0, "packing_format": None}, ("float-quantized", "channel", None)),
        ({"data_type": "fp", "bits": 8, "group_size": [128, 128]}, ("fp8", "block", None)),
    ],
)
def test_floats_are_other_dialects_tensors(changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = scheme(**{"packing_format": "auto_round:llm_compressor", "act_bits": 8, **changes})
    assert (found.format, found.strategy, found.group_size) == expected


def test_values_that_are_stored_as_values_are_not_quantised() -> None:
    assert read(packing_format="auto_round:fake").schemes == ()


def test_names_come_before_patterns_and_of_those_the_first_that_is_found_anywhere() -> None:
    extra = {
        "lm_head": {"bits": 16, "data_type": "float"},
        "model.layers.1.down": {"bits": 8, "group_size": None},
        r"layers\.1\.": {"bits": 2},
        r".*down.*": {"bits": 3, "sym": False},
    }
    found = {
        name: read(extra_config=extra).scheme_for(f"model.layers.{name}")
        for name in ("1.down", "1.up", "0.down", "0.up")
    }
    assert [one.num_bits for one in found.values() if one] == [8, 2, 3, 4]
    assert [one.symmetric for one in found.values() if one] == [True, True, False, True]


def test_many_names_make_few_schemes() -> None:
    extra = {f"model.layers.{n}.up": {"bits": 8 if n % 2 else 2} for n in range(5_000)}
    assert len(read(extra_config=extra).schemes) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_type": "mx_int", "packing_format": "auto_round"}, "data_type 'mx_int' of 4 bits, which is not read"),
        ({"data_type": "mx_fp", "bits": 6}, "data_type 'mx_fp' of 6 bits, which is not read"),
        ({"data_type": "nvfp4_v2", "packing_format": "auto_round:llm_compressor_nvfp4_e5m3"}, "packing_format 'auto_r"),
        ({"packing_format": "auto_round:mlx"}, "packing_format 'auto_round:mlx', which is not read"),
        ({"packing_format": "auto_round:toy"}, "packing_format 'auto_round:toy' of integers, which is not read"),
        ({"packing_format": "foo"}, "packing_format 'foo' of integers, which is not read"),
        ({"packing_format": "auto_round:gptq:marlin"}, "packing_format 'auto_round:gptq:marlin' of integers"),
        ({"packing_format": None, "backend": "toy"}, "packing_format 'toy' of integers, which is not read"),
        ({"data_type": "int_asym_dq"}, "data_type 'int_asym_dq' of 4 bits"),
        ({"rotation_config": {"hadamard": True}}, "rotation_config, activations that are rotated while the model runs"),
        ({"act_bits": 8}, "integers for activations of few bits, which is not read"),
        (
            {"extra_config": {"a": {"data_type": "mx_int"}}},
            "quantization_config.extra_config.a is auto-round's with data",
        ),
        ({"extra_config": {"(": {"bits": 8}}}, "extra_config has '(', which is no regular expression"),
        ({"extra_config": {"a": 8}}, "extra_config.a is 8; a table belongs there"),
        ({"bits": "4x"}, "bits is '4x'; a whole number belongs there"),
        ({"group_size": 0}, "group_size is 0; a positive number (-1 for one scale a row) belongs there"),
    ],
)
def test_what_is_not_read_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KconvertError, match=re.escape(said)):
        read(**changes)
