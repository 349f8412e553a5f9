"""The outputs that transformers and serving engines read: plain values, and encodings that config.json declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.engines.mlx import Affine
from kconvert.formats.fp8 import Fp8
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.targets.base import EXPERTS, LINEARS, Names, Table, Target, Targets

if TYPE_CHECKING:
    from kconvert.models.manifest import Manifest
    from kconvert.models.model import Weight

# llm-compressor's recipes leave them: engines fuse the two, and 576 rows of kv_a are no whole number of blocks.
COMPRESSED_KEEPS = frozenset({"attention.q_a", "attention.kv_a"})


# What layers stand behind wherever kt-kernel looks for them, and what it calls the matrices of a routed expert.
KT_PREFIXES = ("", "model.")
MATRICES = {"expert.gate": "w1", "expert.up": "w3", "expert.down": "w2"}


def _fp8_experts(format: Fp8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.fp8 import fp8_table

    return fp8_table(unquantised, format.powers)


def _fp8_all(format: Fp8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    """The published layout lists nothing, and no engine takes lm_head for a Linear: it needs no entry."""
    from kconvert.dialects.fp8 import fp8_table

    return fp8_table((name for name in unquantised if name.rpartition(".")[2] != "lm_head"), format.powers)


def compressed_fp8(format: Fp8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.compressed_tensors import compressed_fp8_table

    return compressed_fp8_table(format.strategy, quantised, unquantised, format.powers)


def int4(format: Packed, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.compressed_tensors import packed_table

    assert format.group_size is not None
    return packed_table(format.group_size, quantised, unquantised)


def int8(format: Int8, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.compressed_tensors import int8_table

    return int8_table(quantised, unquantised)


def mx(format: Mx, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects.compressed_tensors import mx_table

    return mx_table(format.bits, quantised, unquantised)


def nvfp4(format: Nvfp4, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    from kconvert.dialects import compressed_tensors, modelopt

    if format.multiplies:
        return modelopt.nvfp4_table(quantised, unquantised)
    return compressed_tensors.nvfp4_table(quantised, unquantised, activations=format.inputs)


def beside_modelopt(table: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    from kconvert.dialects.modelopt import BESIDE, table_beside

    return {BESIDE: table_beside(table)} if "quant_algo" in table else {}  # DeepSeek-V4 has none


def _deepseek_v4(format: Format, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    """The published releases list nothing: engines know by themselves what is no Linear in FP8."""
    from kconvert.dialects.fp8 import fp8_table

    return fp8_table((), powers=True)


def _deepseek_v4_nvfp4(format: Format, quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    """As NVIDIA's releases: FP8 everywhere, but for the experts."""
    return {**_deepseek_v4(format, quantised, unquantised), "moe_quant_algo": "NVFP4"}


def speaks_deepseek_v4(manifest: Manifest) -> bool:
    """Whether the model calls the scales of FP8 as DeepSeek-V4 does."""
    spelt = manifest.spell(Fp8())
    return isinstance(spelt, Fp8) and spelt.scale_name == "scale"


def _kt_names(before: str, within: str) -> Names:
    """`{before}layers.L.{within}.experts.E.w1` and so on, unless kt-kernel finds the weight by the name that it has.

    ValueError for what is no such matrix of a routed expert.
    """

    def name(weight: Weight) -> str:
        matrix = MATRICES.get(weight.role)
        if matrix is None or weight.layer is None or weight.expert is None:
            raise ValueError(
                f"is {weight.role}, but kt-kernel reads the gate, up and down matrix of each expert, one by one"
            )
        own = f"layers.{weight.layer}.{within}.experts.{weight.expert}.{matrix}"
        return weight.name if weight.name.removesuffix(own) in KT_PREFIXES else before + own

    return name


def _experts_or_all(format: Format, table: Table) -> Mapping[str, Target]:
    return {"experts": Target(format, EXPERTS, table=table), "all": Target(format, LINEARS, COMPRESSED_KEEPS, table)}


def _llm_compressor(strategy: str) -> Target:
    """Its scales have the model's dtype, and transformers dequantises to the scales'."""
    format = Fp8(strategy, scale_name="weight_scale", scale_dtype="BF16")
    return Target(format, LINEARS, COMPRESSED_KEEPS, compressed_fp8)


# DeepSeek-V4's experts, in its FP8 and its own encoding, and MiniMax-M3's: what kt-kernel reads.
V4_FP8 = Fp8(scale_name="scale", powers=True)
V4_MXFP4 = Mx(4, "F8_E8M0", codes_name="weight", codes_dtype="I8", scale_name="scale")
M3_MXFP8 = Mx(8, scale_name="weight_scale_inv")

TARGETS: Targets = {
    "bf16": {"": Target(Dense("BF16"))},
    "f16": {"": Target(Dense("F16"))},
    "fp8": {
        "experts": Target(Fp8(), EXPERTS, table=_fp8_experts),
        "all": Target(Fp8(), LINEARS, table=_fp8_all),
        "compressed-tensors": _llm_compressor("block"),
        "compressed-tensors-channel": _llm_compressor("channel"),
    },
    "int4": {"": Target(Packed(32), EXPERTS, table=int4)},
    "int8": _experts_or_all(Int8(), int8),
    "mxfp4": {
        **_experts_or_all(Mx(4), mx),
        "ktransformers": Target(V4_MXFP4, EXPERTS, table=mx, names=_kt_names("", "ffn")),
    },
    "mxfp8": {
        **_experts_or_all(Mx(8), mx),
        "ktransformers": Target(M3_MXFP8, EXPERTS, table=mx, names=_kt_names("model.", "block_sparse_moe")),
    },
    "mlx": {"": Target(Affine(4, 32))},  # and what else the source has, see targets.mlx
    "nvfp4": {
        "compressed-tensors": Target(Nvfp4(), EXPERTS, table=nvfp4),
        "modelopt": Target(Nvfp4(True, inputs=True), EXPERTS, table=nvfp4, beside=beside_modelopt),
    },
}

# vLLM takes the scales of FP8 experts as F32, and those of all Linears with them, if `expert_dtype` says fp8; without it, or
# with E8M0 there, it reads them wrongly. SGLang's own FP8 releases have E8M0 everywhere, and no `expert_dtype`.
DEEPSEEK_V4: Targets = {
    "fp8": {
        "vllm": Target(V4_FP8, LINEARS, table=_deepseek_v4, experts="fp8", spares=True),
        "sglang": Target(replace(V4_FP8, scale_dtype="F8_E8M0"), LINEARS, table=_deepseek_v4, spares=True),
    },
    "mxfp4": {"ktransformers": Target(V4_MXFP4, EXPERTS, table=_deepseek_v4, experts="fp4", spares=True)},
    "nvfp4": {"modelopt": Target(Nvfp4(True, inputs=True), EXPERTS, table=_deepseek_v4_nvfp4, spares=True)},
}
