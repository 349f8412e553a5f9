"""Every encoding is read in a model of every family, and without a manifest, however its one-number tensors are shaped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest

from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.formats import Format
from kconvert.formats.base import ACTIVATIONS
from kconvert.formats.fp8 import Fp8
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.models.catalogue import load_manifests
from kconvert.models.model import Weight, understand

FAMILIES = sorted(load_manifests())


def table(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": []}


FP8, BLOCKS = {"quant_method": "fp8"}, {"quant_method": "fp8", "weight_block_size": [128, 128]}
FLOAT = {"num_bits": 8, "type": "float"}
# A spelling in config.json, and what it makes of a weight; the parts of one number come in every shape.
SPELLINGS: dict[str, tuple[dict[str, Any], Format]] = {
    "fp8 tensor": (table("float-quantized", **FLOAT, strategy="tensor"), Fp8("tensor", scale_name="weight_scale")),
    "fp8 tensor, by no name": (FP8, Fp8("tensor", scale_name="weight_scale")),
    "fp8 tensor, by a block's name": (FP8, Fp8("tensor")),
    "fp8 channel": (table("float-quantized", **FLOAT, strategy="channel"), Fp8("channel", scale_name="weight_scale")),
    "fp8 channel, by no name": (FP8, Fp8("channel")),
    "fp8 channel in a model of blocks": (BLOCKS, Fp8("channel")),
    "fp8 block": (BLOCKS, Fp8()),
    "fp8 block, by a tensor's name": (BLOCKS, Fp8(scale_name="weight_scale", scale_dtype="BF16")),
    "fp8 block of exponents": (BLOCKS, Fp8(scale_dtype="F8_E8M0")),
    "fp8 block of exponents as bytes": (BLOCKS, Fp8(scale_dtype="U8")),
    "int8 tensor": (table("int-quantized", strategy="tensor"), Int8("tensor")),
    "int8 tensor, asymmetric": (
        table("int-quantized", strategy="tensor", symmetric=False),
        Int8("tensor", None, False),
    ),
    "int8 channel": (table("int-quantized", strategy="channel"), Int8()),
    "int4 unpacked": (table("int-quantized", num_bits=4, strategy="group", group_size=32), Int8("group", 32, bits=4)),
    "int4 channel": (table("pack-quantized", num_bits=4, strategy="channel"), Packed(None, None)),
    "int4": (table("pack-quantized", num_bits=4, strategy="group", group_size=32), Packed(32, scale_dtype="F16")),
    "nvfp4": (
        table("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        Nvfp4(),
    ),
    "mxfp4": (table("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), Mx(4)),
}


@pytest.fixture
def read(
    small_config: Callable[..., dict[str, Any]],
    tensors_of: Callable[..., dict[str, Tensor]],
    checkpoint_of: Callable[..., Checkpoint],
) -> Callable[..., Weight]:
    """`read(family, spelling, ones, beside)`: one weight in this encoding; its parts of one number have the shape `ones`,
    and it has the tensors `beside` {suffix: (dtype, shape)}."""

    def make(family: str, spelling: str, ones: tuple[int, ...], beside: dict[str, Any]) -> Weight:
        quantization, format = SPELLINGS[spelling]
        config = small_config(family, quantization_config=quantization)
        tensors = tensors_of(family, config) or {"a.norm": Tensor("a.norm", "BF16", (256,), "a", 0, 0)}
        attention = (name for name in tensors if "attn.o_proj.weight" in name)
        whole = tensors.pop(next(attention, "transformer.h.0.o_proj.weight"), None)
        rows, cols = (256, 512) if whole is None else whole.shape
        name = "transformer.h.0.o_proj" if whole is None else whole.name.removesuffix(".weight")
        facts = {part.suffix: (part.dtype, part.shape) for part in format.parts(rows, cols)} | beside
        for suffix, (dtype, shape) in facts.items():
            one = shape == (1,) and suffix not in beside
            tensors[f"{name}.{suffix}"] = Tensor(f"{name}.{suffix}", dtype, ones if one else shape, "a", 0, 0)
        (weight,) = [w for w in understand(checkpoint_of(config, tensors)).weights if w.name == name]
        assert (weight.rows, weight.cols, weight.format) == (rows, cols, format)
        return weight

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_number_is_one_number_in_every_shape(read: Any, family: str, spelling: str) -> None:
    for ones in ((), (1,), (1, 1)):
        assert not read(family, spelling, ones, {}).companions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_describes_activations_lies_beside_in_every_dtype_and_shape(read: Any, family: str, spelling: str) -> None:
    kinds = cycle([("F32", ()), ("BF16", (1,)), ("I8", (512,)), ("F64", (3, 5, 7)), ("I64", (0,)), ("F4", (2,))])
    beside = dict(zip(sorted(ACTIVATIONS), kinds, strict=False))
    weight = read(family, spelling, (1,), beside)
    assert {tensor.name.rpartition(".")[2] for tensor in weight.companions} == beside.keys()
