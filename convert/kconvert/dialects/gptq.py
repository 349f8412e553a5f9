"""GPTQ's dialect, of AutoGPTQ, transformers and gptqmodel: `bits`, `group_size`, and rules by module in `dynamic`.

Which modules are quantised their tensors say: `lm_head`, `modules_in_block_to_quantize` and the rules that spare modules agree
with them. `checkpoint_format` says how zero points are stored; for its first version gptqmodel takes one off whole words of
them, others off each.
Source: https://github.com/ModelCloud/GPTQModel, `quantization/config.py` and `utils/model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from kconvert.dialects.base import EVERYTHING, QuantizationConfig, by_name
from kconvert.dialects.fields import PATTERN, Table, brief, check_expression
from kconvert.errors import KconvertError
from kconvert.formats.base import Scheme

METHODS: tuple[str, ...] = ("gptq", "gptq-marlin")
SIGNS = frozenset({"desc_act", "checkpoint_format"})
FORMATS = {"gptq": "gptq", "gptq_v2": "gptq_v2", "gptq_p": "gptq_v2"}
BITS = (2, 3, 4, 8)
IN_PLANES = "gptq_p"  # another order of the bits of codes of three
SPARED, QUANTISED = "-:", "+:"  # before the patterns of `dynamic`
# A pattern that is one whole name.
WHOLE_NAME = re.compile(r"\^((?:[\w-]|\\\.)+)\$")


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    check_words(table)
    name = table.text("checkpoint_format", table.text("format", "gptq")).lower()
    check_order(table, "marlin" if table.values.get("is_marlin_format") is True else name, FORMATS)
    spelling = FORMATS[name]
    meta = table.values.get("meta")
    if name == "gptq" and isinstance(meta, dict) and "gptqmodel:" in str(meta.get("quantizer")):
        spelling = "gptqmodel"
    bits = tuple(number for number in BITS if number != 3) if name == IN_PLANES else BITS
    return with_rules(table, integers(table, spelling, bits), bits)


def check_words(table: Table) -> None:
    """KconvertError where codes are packed into other words than those of 32 bits."""
    if table.text("pack_dtype", "int32").removeprefix("torch.") != "int32":
        raise table.fault("pack_dtype", "'int32', the words that are read,")


def check_order(table: Table, name: str, read: Collection[str]) -> None:
    """KconvertError where codes lie in an order, called `name`, that is none of those that are read."""
    if name not in read:
        raise KconvertError(
            f"{table.place} has weights in the format {brief(name)}, which is not read, only {' and '.join(read)}; "
            "convert the checkpoint that it was made from"
        )


def integers(table: Table, format: str, bits: Collection[int], default: Scheme | None = None) -> Scheme:
    """The scheme of all modules that `bits`, `group_size`, `sym` and `desc_act` of a table describe, one of the format.

    KconvertError for what makes no sense, and other `bits` than these. `default` has what the table leaves out.
    """
    count, size = table.integer("bits"), table.integer("group_size")
    if default is None:
        default = Scheme(format, strategy="group", group_size=128, targets=EVERYTHING)
    elif "bits" not in table:
        count = default.num_bits
    if count is None or count not in bits:
        raise table.fault("bits", f"{' or '.join(map(str, bits))}")
    if size is None:
        size = default.group_size or -1
    if size == 0 or size < -1:
        raise table.fault("group_size", "a positive number (-1 for one scale a row)")
    return replace(
        default,
        num_bits=count,
        group_size=size if size > 0 else None,
        strategy="group" if size > 0 else "channel",
        symmetric=table.flag("sym", default.symmetric) if "sym" in table else default.symmetric,
        ordered=table.flag("desc_act", default.ordered) if "desc_act" in table else default.ordered,
    )


def by_pattern(table: Table, pattern: str, search: str = "") -> str:
    """The pattern as a target; KconvertError where it is none. `search`: what may come before it in a name."""
    target = f"{search}(?:{pattern})" if search else pattern
    check_expression(table.place, target, pattern)
    return PATTERN + target


def with_rules(table: Table, scheme: Scheme, bits: Collection[int]) -> QuantizationConfig:
    """What the table says of all modules, and in `dynamic` of some: the first pattern that matches a name counts."""
    rules = table.table_if_any("dynamic")
    found: list[tuple[str, Scheme]] = []
    for key in rules.values:
        pattern = by_pattern(rules, key.removeprefix(SPARED).removeprefix(QUANTISED))
        if not key.startswith(SPARED):
            found.append((pattern, integers(rules.table(key), scheme.format, bits, scheme)))
    whole = [WHOLE_NAME.fullmatch(pattern.removeprefix(PATTERN)) for pattern, _ in found]
    if all(whole):  # names are found faster than patterns
        names = [match[1].replace("\\.", ".") for match in whole if match]
        return QuantizationConfig((*by_name(zip(names, (rule for _, rule in found), strict=True)), scheme))
    return QuantizationConfig((*by_name(found), scheme), order=tuple(pattern for pattern, _ in found))
