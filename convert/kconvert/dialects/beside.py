"""Quantisation that a file beside config.json declares, and config.json does not: some tools write such a file only."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from kconvert.dialects.base import QuantizationConfig
from kconvert.dialects.fields import Table
from kconvert.dialects.registry import dialect_of
from kconvert.errors import KconvertError

DECLARING_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def declared_beside(
    names: Collection[str], read: Callable[[str], bytes], config: Mapping[str, Any]
) -> QuantizationConfig | None:
    """What the first of the side files `names` that declares something says; None: none declares anything.

    It is for a checkpoint whose tensors are quantised as its `config`.json does not say. `read` gives a file's content. The
    sentence of a KconvertError begins with the file's name.
    """
    for name in DECLARING_FILES:
        if name not in names:
            continue
        try:
            values = json.loads(read(name))
        except (ValueError, RecursionError):
            raise KconvertError(f"{name} is no JSON; fetch it again") from None
        if isinstance(values, dict) and values:
            table = Table("", values, name, config)
            return replace(dialect_of(table).read(table), file=name)
    return None
