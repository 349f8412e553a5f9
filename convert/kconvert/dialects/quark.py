"""AMD's Quark: what `global_quant_config`, or a module's own in `layer_quant_config`, says of its `weight`; and `exclude`.

Names are modules', whose insides they mean too, patterns of the shell, or expressions after `re:`. `pack_method: reorder` is
of packed integers, which are not read; floats and INT8 lie in their own order whatever it says.
Source: amd-quark 0.13, `torch/export/main_export/quant_config_parser.py`, `torch/utils/pack.py`.
"""

from __future__ import annotations

from kconvert.dialects.base import EVERYTHING, QuantizationConfig, by_name
from kconvert.dialects.fields import Table, brief
from kconvert.errors import KconvertError
from kconvert.formats.base import Scheme

METHODS: tuple[str, ...] = ("quark",)
GLOBAL, LAYERS, TYPES = "global_quant_config", "layer_quant_config", "layer_type_quant_config"
SIGNS = frozenset({GLOBAL, LAYERS})
BYTES = {"fp8_e4m3": "float", "int8": "int"}
STRATEGIES = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group", "per_block": "block"}


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    chosen: dict[str, Scheme | None] = {}
    for group, targets in _groups(table):
        scheme = _scheme(group.table("weight")) if "weight" in group else None
        for target in targets:
            chosen.setdefault(target, scheme)
    schemes = by_name((target, scheme) for target, scheme in chosen.items() if scheme is not None)
    spared = tuple(target for target, scheme in chosen.items() if scheme is None)
    return QuantizationConfig(schemes, table.globs("exclude"), spared, inside=True, order=tuple(chosen))


def _groups(table: Table) -> list[tuple[Table, tuple[str, ...]]]:
    """The configs that there are, and the modules that each is for: of several that match a name the first counts."""
    groups: list[tuple[Table, tuple[str, ...]]] = []
    types = table.table_if_any(TYPES)
    if linear := next((name for name in types.values if "Linear" in name), None):
        groups.append((types.table(linear), EVERYTHING))
    elif GLOBAL in table:
        groups.append((table.table(GLOBAL), EVERYTHING))
    layers = table.table_if_any(LAYERS)
    return groups + [(layers.table(name), (layers.target(name),)) for name in layers.values if name in layers]


def _scheme(weight: Table) -> Scheme:
    """How a weight with this spec is quantised."""
    dtype, qscheme = weight.text("dtype", "").lower(), weight.text("qscheme", "").lower()
    strategy, size = STRATEGIES.get(qscheme, ""), weight.integer("group_size")
    exponents = "e8m0" in weight.text("scale_format", "").lower()
    if dtype == "fp4" and strategy == "group" and exponents:
        return Scheme("mxfp4", 4, "float", strategy="group", group_size=size)
    if dtype == "fp8_e4m3" and strategy == "group" and exponents:
        return Scheme("mxfp8-quantized", 8, "float", strategy="group", group_size=size)
    if dtype == "fp8_e4m3" and strategy == "group" and size and size > 0:
        return Scheme("float-quantized", 8, "float", strategy="block", block=(1, size))
    if dtype == "fp8_e4m3" and strategy == "block":
        block = weight.block("block_size")
        if block is None:
            raise weight.fault("block_size", "the size of a block, such as [128, 128],")
        return Scheme("float-quantized", 8, "float", strategy="block", block=block)
    if dtype in BYTES and strategy in ("tensor", "channel"):
        symmetric = weight.values.get("symmetric") is not False  # null for floats
        return Scheme(f"{BYTES[dtype]}-quantized", 8, BYTES[dtype], symmetric, strategy)
    raise KconvertError(
        f"{weight.place} is {brief(dtype)} {brief(qscheme)}, which of Quark's encodings is not read; convert the checkpoint "
        "that it was made from"
    )
