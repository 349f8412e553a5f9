"""The dialects there are; a new one is its file and its line here."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from kconvert.dialects import auto_round, awq, compressed_tensors, fp8, gptq, mlx, modelopt, quark
from kconvert.dialects.base import Dialect, QuantizationConfig
from kconvert.dialects.fields import Table, brief
from kconvert.dialects.tables import declarations
from kconvert.dialects.unread import unread
from kconvert.errors import KconvertError

# Of those with signs in common the narrower comes first: ModelOpt has config_groups too.
DIALECTS: tuple[Dialect, ...] = (modelopt, quark, compressed_tensors, fp8, auto_round, gptq, awq, mlx)
# Files that some tools write beside a config.json that says nothing.
DECLARING_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig:
    """The quantisation that config.json declares; an empty one when it declares none.

    Raises KconvertError saying what it is when it is none that is read, or which key is wrong.
    """
    tables = declarations(config)
    return dialect_of(tables[0]).read(tables[0]) if tables else QuantizationConfig()


def dialect_of(table: Table) -> Dialect:
    """The dialect that the table is written in."""
    for dialect in DIALECTS:
        if _is_in(dialect, table):
            return dialect
    if (other := unread(table)) is not None:
        raise KconvertError(f"{table.place} is {other.describe(table)}, which is not read; {other.helps}")
    read = " and ".join(name for dialect in DIALECTS for name in dialect.METHODS)
    where = table.place_of("quant_method")
    if _method(table):
        raise KconvertError(f"{where} is {brief(table.values['quant_method'])}, which is not known; {read} are read")
    raise KconvertError(f"{where} is missing, and nothing else there says what the weights are; {read} are read")


def _is_in(dialect: Dialect, table: Table) -> bool:
    method = _method(table)
    return method in dialect.METHODS or (not method and any(sign in table for sign in dialect.SIGNS))


def _method(table: Table) -> str:
    """Engines take either spelling."""
    return table.text("quant_method", "").lower().replace("_", "-")


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


def files_beside(config: Mapping[str, Any], quantization: QuantizationConfig) -> tuple[str, ...]:
    """The side files without which a copy of a checkpoint would be less: what declares its quantisation where `config`.json
    does not, and what TensorRT-LLM wants beside ModelOpt's."""
    tables = declarations(config)
    wanted = {quantization.file, modelopt.BESIDE if tables and _is_in(modelopt, tables[0]) else None}
    return tuple(name for name in DECLARING_FILES if name in wanted)
