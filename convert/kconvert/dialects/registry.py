"""The dialects there are; a new one is its file and its line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kconvert.dialects import auto_round, awq, compressed_tensors, fp8, gptq
from kconvert.dialects.base import Dialect, QuantizationConfig
from kconvert.dialects.fields import FILE, Table, brief, key_path
from kconvert.dialects.tables import declarations
from kconvert.dialects.unread import unread
from kconvert.errors import KconvertError

DIALECTS: tuple[Dialect, ...] = (compressed_tensors, fp8, auto_round, gptq, awq)


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig:
    """The quantisation that config.json declares; an empty one when it declares none.

    Raises KconvertError saying what it is when it is none that is read, or which key is wrong.
    """
    tables = declarations(config)
    return dialect_of(tables[0]).read(tables[0]) if tables else QuantizationConfig()


def dialect_of(table: Table) -> Dialect:
    """The dialect that the table is written in."""
    # Engines take either spelling.
    method = table.text("quant_method", "").lower().replace("_", "-")
    for dialect in DIALECTS:
        if method in dialect.METHODS or (not method and any(sign in table for sign in dialect.SIGNS)):
            return dialect
    if (other := unread(table)) is not None:
        raise KconvertError(f"{FILE}: {table.path} is {other.describe(table)}, which is not read; {other.helps}")
    read = " and ".join(name for dialect in DIALECTS for name in dialect.METHODS)
    path = key_path(table.path, "quant_method")
    if method:
        name = brief(table.values["quant_method"])
        raise KconvertError(f"{FILE}: {path} is {name}, which is not known; {read} are read")
    raise KconvertError(f"{FILE}: {path} is missing, and nothing else there says what the weights are; {read} are read")
