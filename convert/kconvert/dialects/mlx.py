"""MLX's dialect: `bits`, `group_size` and `mode` for all modules, and a table of them for each that differs, by its name.

It stands under `quantization`, and mlx-lm writes it once more as `quantization_config`, without a quant_method. Which modules
are quantised their tensors say. Experts of a layer are one module, `mlp.switch_mlp.gate_proj`.
Source: https://github.com/ml-explore/mlx-lm, `mlx_lm/utils.py` (0.32.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kconvert.dialects.base import EVERYTHING, QuantizationConfig, by_name
from kconvert.dialects.fields import Table, brief
from kconvert.dialects.tables import KEYS, MLX_KEY, without_quantization
from kconvert.errors import KconvertError
from kconvert.formats.base import Scheme

METHODS: tuple[str, ...] = ("mlx",)
SIGNS = frozenset({"bits", "group_size"})
# Mode -> type of the codes; their bits and the size of groups where a table leaves them out.
MODES = {"affine": ("int", 4, 64), "mxfp4": ("float", 4, 32), "mxfp8": ("float", 8, 32)}
EXPERT = re.compile(r"(.+)\.experts\.[0-9]+\.(w1|w2|w3|gate_proj|up_proj|down_proj)")
PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    usual = _scheme(table)
    named = [
        (name, _scheme(table.table(name), table)) for name, value in table.values.items() if isinstance(value, dict)
    ]
    return QuantizationConfig((*by_name(named), usual), aliases=module_of)


def _scheme(table: Table, usual: Table | None = None) -> Scheme:
    """What the table says of codes; one without a mode is of integers, as mlx-lm reads it."""
    mode = table.text("mode", "affine")
    if mode not in MODES:
        raise KconvertError(
            f"{table.place_of('mode')} is {brief(mode)}, which is not read, only {' and '.join(MODES)}; convert the checkpoint "
            "that it was made from"
        )
    kind, bits, group = MODES[mode]
    count, size = table.integer("bits"), table.integer("group_size")
    for key, value in (("bits", count), ("group_size", size)):
        if value is not None and value <= 0:
            raise table.fault(key, "a positive number")
    return Scheme(
        "mlx", count or bits, kind, kind == "float", "group", size or group, EVERYTHING if usual is None else ()
    )


@lru_cache(maxsize=1 << 16)
def module_of(weight: str) -> str:
    """What MLX calls the module that a weight is in, or is."""
    if match := EXPERT.fullmatch(weight):
        return f"{match[1]}.switch_mlp.{PROJECTIONS.get(match[2], match[2])}"
    return weight


def mlx_config(config: Mapping[str, Any], modules: Mapping[str, tuple[str, int, int]]) -> dict[str, Any]:
    """A copy of config.json that declares these modules (mode, bits, size of groups) in both places, and nothing else.

    What most of them have stands for all; without modules nothing is declared.
    """
    config = without_quantization(config)
    if not modules:
        return config
    kinds = list(modules.values())
    usual = max(dict.fromkeys(kinds), key=kinds.count)
    others = {name: _table(kind) for name, kind in modules.items() if kind != usual}
    table = {**_table(usual), **others}
    return {**config, MLX_KEY: table, KEYS[0]: table}


def _table(kind: tuple[str, int, int]) -> dict[str, Any]:
    mode, bits, group = kind
    return {"group_size": group, "bits": bits, "mode": mode}
