"""auto-round's dialect: `bits`, `group_size`, `sym` and `data_type` of all modules, in `extra_config` those of some.

Keys of extra_config are names, or patterns that are looked for anywhere in a name, of which the first counts. What
`packing_format` is says in whose tensors integers lie: `auto_round:auto_gptq` in GPTQ's with one less than each zero point,
`auto_round:auto_awq` in AWQ's, `auto_round` and others of its own in GPTQ's with zero points as they are. Floats lie as
compressed-tensors has them.
Source: https://github.com/intel/auto-round, `export` and `inference/convert_model.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from kconvert.dialects.base import EVERYTHING, QuantizationConfig, by_name
from kconvert.dialects.fields import Table, brief
from kconvert.dialects.gptq import by_pattern, integers
from kconvert.errors import KconvertError
from kconvert.formats.base import Scheme

METHODS: tuple[str, ...] = ("auto-round", "intel/auto-round", "inc")
SIGNS = frozenset({"autoround_version", "packing_format"})
PLAIN = "fake"  # values that were quantised and are stored as values
UNREAD_PACKINGS = ("mlx", "e5m3", "gguf", "svdquant")
OWN, GPTQ, AWQ = {"auto_round", "gptqmodel"}, {"auto", "auto_gptq", "gptq"}, {"auto_awq", "awq"}
KERNELS = {"exllama", "exllamav2", "triton", "tritonv2", "tritonv2_zp"}  # older releases say for which they are
ROTATIONS = ("rotation_config", "rotation_configs", "spinquant_config")
NAME = re.compile(r"[\w.-]+")
ANYWHERE = ".*?"
# How data_type begins; `bits` says how many they are of.
FLOATS = (
    ("mx_fp", Scheme("mxfp4-pack-quantized", 4, "float", strategy="group", group_size=32, targets=EVERYTHING)),
    ("mx_fp", Scheme("mxfp8-quantized", 8, "float", strategy="group", group_size=32, targets=EVERYTHING)),
    ("nv_fp", Scheme("nvfp4-pack-quantized", 4, "float", strategy="tensor_group", group_size=16, targets=EVERYTHING)),
)


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    packing = table.text("packing_format", table.text("backend", "auto")).lower()
    if any(word in packing for word in UNREAD_PACKINGS):
        raise _unread(table, f"packing_format {brief(packing)}")
    for key in ROTATIONS:
        if table.values.get(key):
            raise _unread(table, f"{key}, activations that are rotated while the model runs")
    if packing.endswith(f":{PLAIN}"):
        return QuantizationConfig()
    extra = table.table_if_any("extra_config")
    found: list[tuple[str, Scheme]] = []
    for key in extra.values:
        is_name = NAME.fullmatch(key) is not None
        target = key if is_name else by_pattern(extra, key, ANYWHERE)
        own = extra.table(key)
        said = {name: value for name, value in own.values.items() if value is not None}
        if (scheme := _scheme(replace(own, values={**table.values, **said}), packing)) is not None:
            found.append((target, scheme))
    default = _scheme(table, packing)
    schemes = (*by_name(found), *([default] if default else ()))
    return QuantizationConfig(schemes, order=tuple(target for target, _ in found))


def _scheme(table: Table, packing: str) -> Scheme | None:
    """The scheme of all modules by what a table says; None where weights stay as they are."""
    bits, kind = table.integer("bits"), table.text("data_type", "int").lower()
    if bits is not None and bits >= 16:
        return None
    for beginning, scheme in FLOATS:
        if kind.startswith(beginning) and bits == scheme.num_bits:
            return scheme
    if kind.startswith(("fp", "float")) and bits == 8:
        return _fp8(table)
    if not kind.startswith(("int", "rtn_int")) or kind.endswith(("_dq", "_float_zp")):
        raise _unread(table, f"data_type {brief(kind)} of {brief(bits)} bits")
    if (table.integer("act_bits") or 16) <= 8:
        raise _unread(table, "integers for activations of few bits")
    words = set(packing.split(":"))
    if not words <= OWN | GPTQ | AWQ | KERNELS:
        raise _unread(table, f"packing_format {brief(packing)} of integers")
    if words & AWQ:
        return integers(table, "awq", (4,))
    own = "gptqmodel" in words or ("auto_round" in words and not words & GPTQ)
    return integers(table, "gptq_v2" if own else "auto-round", range(2, 9))


def _fp8(table: Table) -> Scheme:
    """Of E4M3; what a scale is of its shape says."""
    if isinstance(table.values.get("group_size"), list):
        block = table.block("group_size")
        return Scheme("fp8", type="float", strategy="block", block=block, targets=EVERYTHING)
    return Scheme("float-quantized", type="float", strategy="channel", targets=EVERYTHING)


def _unread(table: Table, what: str) -> KconvertError:
    return KconvertError(
        f"{table.place} is auto-round's with {what}, which is not read; convert the checkpoint that it was made from"
    )
