"""DeepSeek's dialect `fp8`: `weight_block_size` and the names of the modules that stay as they are.

Names are whole names, as vLLM reads them. There are no targets: what has the tensors of an FP8 weight is one, also lm_head
and embeddings, which engines take for no Linear and published files have whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kconvert.dialects.base import QuantizationConfig, both_names
from kconvert.dialects.fields import FILE, SCALE_FORMAT, UE8M0, Table, brief, powers_of_two
from kconvert.errors import KconvertError
from kconvert.formats.base import Scheme

METHODS: tuple[str, ...] = ("fp8",)
SIGNS: frozenset[str] = frozenset()
# Where later releases say that their experts are in another encoding than everything else.
EXPERTS_KEYS = ("moe_quant_algo", "routed_experts_quant_method", "expert_dtype")
FP8_NAMES = ("fp8", "float8", "f8")


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    for key in EXPERTS_KEYS:
        if not table.text(key, "fp8").lower().startswith(FP8_NAMES):
            raise KconvertError(
                f"{FILE}: {table.path} has quant_method 'fp8', but experts with {key} {brief(table.values[key])}, which is "
                "not read; convert the FP8 release of the model"
            )
    block = table.block("weight_block_size")
    scheme = Scheme(
        "fp8",
        type="float",
        strategy="block" if block else "tensor",
        block=block,
        targets=("Module",),
        powers=powers_of_two(table),
    )
    return QuantizationConfig((scheme,), table.names("ignored_layers") or table.names("modules_to_not_convert"))


def fp8_table(unquantised: Iterable[str], powers: bool = False, block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """The dialect for blocks of this size, if `powers` with scales that are powers of two.

    `unquantised` are the Linears that stay as they are.

    vLLM compares whole names and SGLang dotted paths; neither takes patterns here, so every name is spelt out.
    """
    names = both_names(unquantised)
    table: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    table |= {SCALE_FORMAT: UE8M0} if powers else {}
    return {**table, "modules_to_not_convert": names} if names else table
