"""config.json and the quantization_config in it, in every dialect that checkpoints come in.

Dialects: compressed-tensors (`config_groups`, `ignore`; https://github.com/vllm-project/compressed-tensors) and DeepSeek's
`fp8` (`weight_block_size`, `modules_to_not_convert`), kept at the top level, under `text_config` (Kimi-K2.5) or as
`compression_config` (old files).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from kconvert.errors import KconvertError

KEYS = ("quantization_config", "compression_config")
NESTED = "text_config"
# Multimodal checkpoints keep the language model below this name; engines know its modules with and without.
LANGUAGE_MODEL = "language_model."


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of one config group are quantised; field names and values are compressed-tensors' own.

    `block` is its block_structure. DeepSeek's dialect is the format `fp8`.
    """

    format: str
    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    targets: tuple[str, ...] = ("Linear",)
    block: tuple[int, int] | None = None

    def __str__(self) -> str:
        size = f" {self.group_size}" if self.group_size else " {}x{}".format(*self.block) if self.block else ""
        sign = "" if self.symmetric else " asymmetric"
        return f"{self.format} {self.type}{self.num_bits} {self.strategy}{size}{sign}"


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The schemes of a checkpoint, in the order in which they are tried, and the modules that none applies to."""

    schemes: tuple[Scheme, ...] = ()
    ignore: tuple[str, ...] = ()

    def scheme_for(self, module: str) -> Scheme | None:
        """The scheme of the Linear called `module`, None when it is not quantised."""
        if any(matches(module, pattern) for pattern in self.ignore):
            return None
        for scheme in self.schemes:
            if any(target == "Linear" or matches(module, target) for target in scheme.targets):
                return scheme
        return None


def matches(module: str, pattern: str) -> bool:
    """compressed-tensors' rule: `re:` patterns match from the start of the module's name, others are the whole name."""
    if pattern.startswith("re:"):
        return _compiled(pattern).match(module) is not None
    return pattern == module


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern[3:])


def quantization_tables(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every quantisation table of a config.json, in the order in which serving engines look for it."""
    nested = config.get(NESTED)
    candidates = [config.get(KEYS[0]), nested.get(KEYS[0]) if isinstance(nested, dict) else None, config.get(KEYS[1])]
    for table in filter(None, candidates):
        if not isinstance(table, dict):
            raise KconvertError(f"config.json: its quantization_config is no table but {table!r}; fetch it again")
        yield table


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig:
    """The quantisation that config.json declares; an empty one when it declares none."""
    table = next(quantization_tables(config), None)
    if table is None:
        return QuantizationConfig()
    method = table.get("quant_method", "compressed-tensors")
    if not isinstance(method, str) or method not in DIALECTS:
        supported = ", ".join(DIALECTS)
        raise KconvertError(f"config.json: quant_method {method!r} is not supported; supported: {supported}")
    try:
        return DIALECTS[method](table)
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise KconvertError(f"config.json: its quantization_config is malformed ({error!r}); fetch it again") from None


def _read_compressed_tensors(table: Mapping[str, Any]) -> QuantizationConfig:
    groups = table["config_groups"].values()
    schemes = tuple(_scheme(group, table.get("format", "")) for group in groups if group.get("weights"))
    ignore = _strings(table.get("ignore") or ())
    for pattern in (*ignore, *(target for scheme in schemes for target in scheme.targets)):
        re.compile(pattern.removeprefix("re:"))
    return QuantizationConfig(schemes, ignore)


def _read_fp8(table: Mapping[str, Any]) -> QuantizationConfig:
    """DeepSeek's dialect as vLLM reads it: names are whole names, and lm_head, which is no Linear there, is never meant."""
    block = _block(table.get("weight_block_size"))
    scheme = Scheme("fp8", type="float", strategy="block" if block else "tensor", block=block)
    names = table.get("ignored_layers") or table.get("modules_to_not_convert") or ()
    return QuantizationConfig((scheme,), (*_strings(names), r"re:(.*\.)?lm_head$"))


DIALECTS = {"compressed-tensors": _read_compressed_tensors, "fp8": _read_fp8}


def _scheme(group: Mapping[str, Any], default_format: str) -> Scheme:
    weights = group["weights"]
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    scheme = Scheme(
        format=str(group.get("format") or default_format),
        num_bits=int(weights.get("num_bits", 8)),
        type=str(weights.get("type", "int")),
        symmetric=bool(weights.get("symmetric", True)),
        strategy=str(strategy),
        group_size=int(size) if strategy == "group" else None,
        block=_block(weights.get("block_structure")) if strategy == "block" else None,
        targets=_strings(group.get("targets") or ("Linear",)),
    )
    if scheme.strategy == "group" and (scheme.group_size or 0) <= 0:
        raise ValueError(f"group_size {size}")
    return scheme


def _block(sizes: Any) -> tuple[int, int] | None:
    """Rows and columns of a block; old files of compressed-tensors write "128x128"."""
    if sizes is None:
        return None
    rows, cols = (int(size) for size in (sizes.split("x") if isinstance(sizes, str) else sizes))
    if rows <= 0 or cols <= 0:
        raise ValueError(f"block of {rows} rows and {cols} columns")
    return rows, cols


def _strings(values: Iterable[Any]) -> tuple[str, ...]:
    values = tuple(values)
    if not all(isinstance(value, str) for value in values):
        raise TypeError("a name that is not a string")
    return values


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json with every trace of quantisation gone, also the nested one (engines consult all of them)."""
    plain = copy.deepcopy(dict(config))
    for table in (plain, plain.get(NESTED)):
        if isinstance(table, dict):
            for key in KEYS:
                table.pop(key, None)
    return plain


def with_quantization(config: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json that declares the quantisation `table` and no other.

    It goes to the top level also where the source keeps it in `text_config` (Kimi-K2.5): engines look there first, and a
    second, nested one would be another place to disagree.
    """
    return {**without_quantization(config), KEYS[0]: dict(table)}


def fp8_table(unquantised: Iterable[str]) -> dict[str, Any]:
    """DeepSeek's dialect for FP8 in blocks of 128x128; `unquantised` are the Linears that stay as they are.

    vLLM compares whole names and SGLang dotted paths; neither takes patterns here, so every name is spelt out.
    """
    names = both_names(unquantised)
    table: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    return {**table, "modules_to_not_convert": names} if names else table


def compressed_fp8_table(strategy: str, quantised: Iterable[str], unquantised: Iterable[str]) -> dict[str, Any]:
    """compressed-tensors' presets FP8_BLOCK (strategy `block`) and FP8_DYNAMIC (`channel`), for these Linears."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: dict[str, Any] = {**common, "strategy": strategy, "dynamic": False}
    inputs: dict[str, Any] = {**common, "dynamic": True}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
        inputs.update(strategy="group", group_size=128)
    else:
        inputs.update(strategy="token")
    return compressed_table(
        "float-quantized", {"weights": weights, "input_activations": inputs}, quantised, unquantised
    )


# What moonshotai's INT4 releases list since Kimi-K2-Thinking.
KIMI_IGNORE = ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")


def packed_table(group_size: int, quantised: Iterable[str], unquantised: Iterable[str]) -> dict[str, Any]:
    """compressed-tensors' `pack-quantized` INT4 as in Kimi-K2-Thinking; its patterns where they say just what is meant."""
    unquantised = both_names(unquantised)
    hit = [name for name in (*unquantised, *both_names(quantised)) if any(matches(name, p) for p in KIMI_IGNORE)]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}},
        "ignore": list(KIMI_IGNORE) if hit == unquantised else unquantised,
    }


def int8_table(quantised: Iterable[str], unquantised: Iterable[str]) -> dict[str, Any]:
    """compressed-tensors' preset INT8 (W8A8), for these Linears."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return compressed_table("int-quantized", {"weights": weights, "input_activations": inputs}, quantised, unquantised)


def mx_table(bits: int, quantised: Iterable[str], unquantised: Iterable[str]) -> dict[str, Any]:
    """compressed-tensors' presets MXFP4A16 and MXFP8A16: quantised weights, and activations as they come."""
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    scales = {"dynamic": False, "scale_dtype": "torch.uint8"}
    format = "mxfp4-pack-quantized" if bits == 4 else "mxfp8-quantized"
    return compressed_table(format, {"weights": {**weights, **scales}}, quantised, unquantised)


def compressed_table(
    format: str, group: Mapping[str, Any], quantised: Iterable[str], unquantised: Iterable[str]
) -> dict[str, Any]:
    """compressed-tensors' dialect with one config group for all the Linears that are quantised."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": ignore_list(quantised, unquantised),
    }


# What llm-compressor's recipes for this architecture leave alone, in their words.
USUAL_IGNORE = ("lm_head", r"re:.*\.gate$", "re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$", "re:.*embed_tokens$")


def ignore_list(quantised: Iterable[str], unquantised: Iterable[str]) -> list[str]:
    """compressed-tensors' `ignore`: the usual patterns as far as they hit nothing quantised, and names for the rest."""
    quantised = tuple(both_names(quantised))
    patterns = [p for p in USUAL_IGNORE if not any(matches(name, p) for name in quantised)]
    rest = (name for name in both_names(unquantised) if not any(matches(name, p) for p in patterns))
    return [*patterns, *rest]


def both_names(modules: Iterable[str]) -> list[str]:
    """The modules' names, those of a language model inside a multimodal one also without its prefix."""
    modules = tuple(modules)
    stripped = (name.removeprefix(LANGUAGE_MODEL) for name in modules if name.startswith(LANGUAGE_MODEL))
    return [*modules, *stripped]
