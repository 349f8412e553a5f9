"""The outputs that transformers and serving engines read: plain values, and encodings that config.json declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import Mx
from kconvert.formats.packed import Packed
from kconvert.targets.base import EXPERTS, LINEARS, Table, Target, Targets

# llm-compressor's recipes leave them: engines fuse the two, and 576 rows of kv_a are no whole number of blocks.
COMPRESSED_KEEPS = frozenset({"attention.q_a", "attention.kv_a"})


def _fp8_experts(format: Fp8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.fp8 import fp8_table

    return fp8_table(unquantised)


def _fp8_all(format: Fp8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    """The published layout lists nothing, and no engine takes lm_head for a Linear: it needs no entry."""
    from kconvert.dialects.fp8 import fp8_table

    return fp8_table(name for name in unquantised if name.rpartition(".")[2] != "lm_head")


def _compressed_fp8(format: Fp8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.compressed_tensors import compressed_fp8_table

    return compressed_fp8_table(format.strategy, quantised, unquantised)


def _int4(format: Packed, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.compressed_tensors import packed_table

    assert format.group_size is not None
    return packed_table(format.group_size, quantised, unquantised)


def _int8(format: Int8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.compressed_tensors import int8_table

    return int8_table(quantised, unquantised)


def _mx(format: Mx, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.compressed_tensors import mx_table

    return mx_table(format.bits, quantised, unquantised)


def _experts_or_all(format: Format, table: Table) -> Mapping[str, Target]:
    return {"experts": Target(format, EXPERTS, table=table), "all": Target(format, LINEARS, COMPRESSED_KEEPS, table)}


def _llm_compressor(strategy: str) -> Target:
    """Its scales have the model's dtype, and transformers dequantises to the scales'."""
    format = Fp8(strategy, scale_name="weight_scale", scale_dtype="BF16")
    return Target(format, LINEARS, COMPRESSED_KEEPS, _compressed_fp8)


TARGETS: Targets = {
    "bf16": {"": Target(Dense("BF16"))},
    "f16": {"": Target(Dense("F16"))},
    "fp8": {
        "experts": Target(Fp8(), EXPERTS, table=_fp8_experts),
        "all": Target(Fp8(), LINEARS, table=_fp8_all),
        "compressed-tensors": _llm_compressor("block"),
        "compressed-tensors-channel": _llm_compressor("channel"),
    },
    "int4": {"": Target(Packed(32), EXPERTS, table=_int4)},
    "int8": _experts_or_all(Int8(), _int8),
    "mxfp4": _experts_or_all(Mx(4), _mx),
    "mxfp8": _experts_or_all(Mx(8), _mx),
}
