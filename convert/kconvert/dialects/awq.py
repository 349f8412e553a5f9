"""AWQ's dialect, of AutoAWQ, transformers and gptqmodel: `bits` (or `w_bit`) and `group_size` (or `q_group_size`).

Which modules are quantised their tensors say, and `modules_to_not_convert` agrees with them. `version`, which is for which
kernel the codes lie, is `gemm`, or `exllama`, which reads the same.
Source: https://github.com/casper-hansen/AutoAWQ, `awq/models/_config.py`.
"""

from __future__ import annotations

from dataclasses import replace

from kconvert.dialects.base import QuantizationConfig
from kconvert.dialects.fields import Table
from kconvert.dialects.gptq import check_order, check_words, integers, with_rules

METHODS: tuple[str, ...] = ("awq", "awq-marlin")
SIGNS = frozenset({"zero_point", "q_group_size", "w_bit"})
FORMATS = ("gemm", "exllama")
BITS = (4,)


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    check_words(table)
    name = table.text("version", table.text("checkpoint_format", table.text("format", "gemm")))
    check_order(table, name.lower(), FORMATS)
    spelt = {"bits": table.values.get("w_bit", 4), "group_size": table.values.get("q_group_size")}
    symmetric = not table.flag("zero_point", True)
    scheme = integers(replace(table, values={**spelt, "sym": symmetric, **table.values}), "awq", BITS)
    return with_rules(table, scheme, BITS)
