"""DeepSeek's dialects `fp8` and `mxfp8`: `weight_block_size` and the names of the modules that stay as they are.

Names are whole names, as vLLM reads them. There are no targets: what has the tensors of an FP8 weight is one, also lm_head
and embeddings, which engines take for no Linear and published files have whole. A block of one row and 32 columns is MXFP8's.
Routed experts may be in another encoding: by `moe_quant_algo` (NVIDIA's DeepSeek-V4), `routed_experts_quant_method` (Ling-3) or
`store_dtype` (MiMo-V2), or by `expert_dtype`, which DeepSeek-V4 has beside the table and V4.1 in it. A V4 may have FP4 in any
module (NVIDIA's keeps that of the MTP layers), V4.1 MXFP8 in its Engram tables, where nothing says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from kconvert.dialects.base import EVERYTHING, QuantizationConfig, both_names
from kconvert.dialects.fields import LANGUAGE_MODEL, SCALE_FORMAT, UE8M0, Table, bare_name, brief, powers_of_two
from kconvert.errors import KconvertError
from kconvert.formats.base import Scheme

METHODS: tuple[str, ...] = ("fp8", "mxfp8")
SIGNS: frozenset[str] = frozenset()
EXPERTS = (r"re:.*\bexperts\.\d+\.",)
MXFP8_BLOCK = (1, 32)
MXFP8 = Scheme("mxfp8", 8, "float", strategy="group", group_size=32, targets=EVERYTHING)
FP4 = Scheme("fp4", 4, "float", strategy="group", group_size=32, targets=EXPERTS)
MXFP4 = replace(FP4, format="mxfp4")
NVFP4 = Scheme("nvfp4", 4, "float", strategy="tensor_group", group_size=16, targets=EXPERTS)
# Where a release says in which encoding its routed experts are.
EXPERTS_KEYS = ("moe_quant_algo", "routed_experts_quant_method", "store_dtype", "expert_dtype")
EXPERTS_SCHEMES = {"nvfp4": NVFP4, "mxfp4": MXFP4, "fp4": FP4, "mxfp8": replace(MXFP8, targets=EXPERTS)}
LANGUAGE_MODELS = frozenset({"model", "language_model", "layers", "lm_head"})  # how names of one may begin
USUAL_NAMES = ("fp8", "float8", "f8", "bf16", "bfloat16")
DEEPSEEK_V4 = "deepseek_v4"


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    block = table.block("weight_block_size")
    strategy, powers = "block" if block else "tensor", powers_of_two(table)
    scheme = Scheme("fp8", type="float", strategy=strategy, block=block, targets=EVERYTHING, powers=powers)
    implied = (FP4, MXFP8) if str(table.config.get("model_type")).startswith(DEEPSEEK_V4) else ()
    if block == MXFP8_BLOCK or table.text("quant_method", "").lower() == "mxfp8":
        scheme, implied = MXFP8, (*implied, scheme)
    experts = _experts(table)
    ignore = table.names("ignored_layers") or table.names("modules_to_not_convert")
    return QuantizationConfig((scheme, *([experts] if experts else [])), ignore, implied=implied)


def _experts(table: Table) -> Scheme | None:
    """The scheme of routed experts in another encoding than everything else, by the first that says one."""
    root = Table("", table.config)
    around = [root, root.table("text_config")] if isinstance(root.values.get("text_config"), dict) else [root]
    said = [*((table, key) for key in EXPERTS_KEYS), *((place, EXPERTS_KEYS[-1]) for place in around)]
    place, key = next(((place, key) for place, key in said if key in place), said[0])
    name = place.text(key, "").lower()
    if not name or name.startswith(USUAL_NAMES):
        return None
    if name not in EXPERTS_SCHEMES:
        raise KconvertError(
            f"{place.place_of(key)} is {brief(place.values[key])}, an encoding of experts that is not read beside FP8; convert "
            "the FP8 release of the model"
        )
    return EXPERTS_SCHEMES[name]


def fp8_table(unquantised: Iterable[str], powers: bool = False, block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """The dialect for blocks of this size, if `powers` with scales that are powers of two.

    `unquantised` are the Linears that stay as they are.

    vLLM compares whole names and SGLang dotted paths; neither takes patterns here, so every name is spelt out. transformers has
    a language model inside a larger one, and what is beside it, by names of its own.
    """
    unquantised = tuple(unquantised)
    names = [*both_names(unquantised), *_in_transformers(unquantised)]
    table: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    table |= {SCALE_FORMAT: UE8M0} if powers else {}
    return {**table, "modules_to_not_convert": names} if names else table


def _in_transformers(modules: Sequence[str]) -> Iterator[str]:
    """What transformers calls modules of a language model inside a larger one; of what is beside that the whole, as it cuts
    some of its modules in parts."""
    for name in modules:
        if name.startswith(LANGUAGE_MODEL) and bare_name(name).startswith("layers."):
            yield f"model.{LANGUAGE_MODEL}{bare_name(name)}"
    yield from dict.fromkeys(
        f"model.{word}" for name in modules if (word := name.partition(".")[0]) not in LANGUAGE_MODELS
    )
