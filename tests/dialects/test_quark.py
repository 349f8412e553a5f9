"""Which of Quark's configs a module has."""

from __future__ import annotations

from typing import Any

import pytest

from kconvert.dialects import QuantizationConfig, read_quantization

FP4 = {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}}
TENSOR, CHANNEL = ({"weight": {"dtype": "fp8_e4m3", "qscheme": f"per_{kind}"}} for kind in ("tensor", "channel"))
PLAIN: dict[str, Any] = {"weight": None}


def read(layers: dict[str, Any], **more: Any) -> QuantizationConfig:
    table = {"quant_method": "quark", "global_quant_config": FP4, "layer_quant_config": layers, **more}
    return read_quantization({"quantization_config": table})


def strategy(quantization: QuantizationConfig, module: str) -> str | None:
    scheme = quantization.scheme_for(module)
    return None if scheme is None else scheme.strategy


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"*self_attn*": TENSOR, "*o_proj": CHANNEL}, "tensor"),
        ({"*o_proj": CHANNEL, "*self_attn*": TENSOR}, "channel"),
        ({"*self_attn*": TENSOR, "*layers.0*": CHANNEL, "*o_proj": TENSOR}, "tensor"),
        ({"*mlp*": TENSOR, "*o_proj": CHANNEL, "*self_attn*": TENSOR}, "channel"),
        ({"*self_attn*": TENSOR, "*layers.0*": PLAIN}, "tensor"),
        ({"*self_attn*": PLAIN, "*layers.0*": TENSOR}, None),
        ({"model.layers.0.*": TENSOR, "layers.0.*": CHANNEL}, "tensor"),
        ({"*": TENSOR, "model.layers.0.self_attn.o_proj": CHANNEL}, "channel"),
        ({"*mlp*": TENSOR}, "group"),
    ],
)
def test_the_first_pattern_of_the_file_that_matches_counts(layers: dict[str, Any], expected: str | None) -> None:
    assert strategy(read(layers), "model.layers.0.self_attn.o_proj") == expected


def test_what_is_excluded_has_no_config_of_its_own() -> None:
    assert strategy(read({"*o_proj": TENSOR}, exclude=["*self_attn*"]), "model.layers.0.self_attn.o_proj") is None


def test_many_names_make_few_schemes() -> None:
    layers = {f"model.layers.{n}.up": CHANNEL if n % 2 else TENSOR for n in range(5_000)}
    assert len(read(layers).schemes) == 3
