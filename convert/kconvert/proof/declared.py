"""Whether config.json declares all codes that a checkpoint holds: judged from headers and config.json alone.

This shares nothing with the way by which checkpoints are understood, so that what is overlooked there is seen here. Of the
quantisation it asks only which modules it covers; compressed-tensors' own function matches their names.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import dropwhile
from typing import Any, TypeAlias

from kconvert.checkpoint.listing import CONFIG_NAME
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint
from kconvert.proof.parity import library

Covers: TypeAlias = Callable[[str], bool]  # whether the module called so is quantised
FLOATS = {"F64", "F32", "F16", "BF16", "C64"}
NEVER_CODES = FLOATS | {"BOOL", "I64", "U64"}
INTEGER_TABLES = ("tid2eid", "position_ids", "relative_position_index", "token_type_ids", "d2t", "t2d")
WRAPPERS = ("language_model", "model")
OUTER = (*WRAPPERS, "model.language_model", "language_model.model")  # what a language model is called in names
MASKS = ("attn.bias", "masked_bias", "attention_mask", "causal_mask")
INNER = "quantization_config"  # where transformers kept a table within a table once
# What gives away a table without quant_method.
KEYS = {"quantization": "modelopt", "quant_algo": "modelopt", "global_quant_config": "quark"}
KEYS |= dict.fromkeys(("config_groups", INNER), "compressed-tensors")
KEYS |= {"group_size": "mlx"}
BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def undeclared(checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence for each tensor of codes that the checkpoint's config.json does not cover, or that has no scale beside it."""
    tables = [*_tables(checkpoint.config)] or [*_beside(checkpoint)]
    covers = [cover for table in tables if (cover := _reader(table))]
    modules: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        modules[_module(tensor.name)].append(tensor)
    for module, tensors in modules.items():
        scales = [tensor for tensor in tensors if _is_scale(tensor.name)]
        codes = [t for t in tensors if not _is_scale(t.name) and _holds_codes(t, scaled=bool(scales))]
        if codes and not (_is_covered(module, covers) or _is_held(checkpoint.config, module)):
            yield _fault(checkpoint, codes[0], f"but {CONFIG_NAME} declares no quantisation of {module!r}")
        elif codes and not scales:
            yield _fault(checkpoint, codes[0], "but has no scale beside it")
        elif scales and not codes and _holds_codes(scales[0]):
            yield _fault(checkpoint, scales[0], "but there are no codes that it belongs to")


def unscaled(checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence for each weight of compressed-tensors' NVFP4 whose activations are quantised, too, by what config.json says of
    it, and which has no scale for these."""
    for table in _tables(checkpoint.config):
        for name, group in _table(table.get("config_groups")).items():
            inputs, weights = (_table(_table(group).get(key)) for key in ("input_activations", "weights"))
            if not inputs or inputs.get("dynamic") is True or weights.get("strategy") != "tensor_group":
                continue
            covers = _compressed_tensors({**table, "config_groups": {name: group}})
            for tensor in checkpoint.tensors.values():
                module, _, last = tensor.name.rpartition(".")
                is_lacking = last == "weight_global_scale" and f"{module}.input_global_scale" not in checkpoint.tensors
                if is_lacking and _is_covered(module, [covers]):
                    what = f"but its activations have no input_global_scale, as config_groups.{name} of {CONFIG_NAME} wants"
                    yield _fault(checkpoint, tensor, what)


def _is_covered(module: str, covers: Iterable[Covers]) -> bool:
    names = {module, module.removeprefix("language_model."), module.removeprefix("model.language_model.")}
    return any(cover(name) for cover in covers for name in names)


def _is_held(config: Mapping[str, Any], module: str) -> bool:
    """Whether engines hold the module in FP8 without being told: DeepSeek-V4.1's Engram tables."""
    return config.get("model_type") == "deepseek_v41" and module.endswith(".engram.embed")


def _fault(checkpoint: Checkpoint, tensor: Tensor, what: str) -> str:
    return f"{checkpoint.root / tensor.file}: tensor {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, {what}"


def _holds_codes(tensor: Tensor, scaled: bool = False) -> bool:
    """Integers in a row are counts and the like, unless a scale stands beside them."""
    if tensor.dtype in NEVER_CODES or tensor.name.endswith((*INTEGER_TABLES, *MASKS)):
        return False
    return not tensor.dtype.startswith(("I", "U")) or len(tensor.shape) > 1 or scaled


def _is_scale(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return "scale" in last or "zero" in last or "absmax" in last or last == "scb"


def _module(tensor: str) -> str:
    """The module that a tensor belongs to: its name without the last word, or what a stack's parts begin with."""
    module, _, last = tensor.rpartition(".")
    stem = last
    for part in ("_scale_inv", "_scales", "_scale", "_blocks", "_packed", "_shape"):
        stem = stem.removesuffix(part)
    is_part = stem.startswith(("weight", "input_", "output_", "scale", "qweight", "qzeros"))
    return module if is_part else f"{module}.{stem}"


def _tables(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The quantisations that engines look for."""
    for table in (config, _table(config.get("text_config"))):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(table.get(key), dict):
                yield table[key]


def _beside(checkpoint: Checkpoint) -> Iterator[Mapping[str, Any]]:
    """What files beside config.json declare, which engines read where it says nothing."""
    for name in BESIDE:
        if name in checkpoint.side_files or name in checkpoint.left_out:
            with suppress(ValueError, RecursionError):
                yield _table(json.loads(checkpoint.side_file(name).read_bytes()))


def _reader(table: Mapping[str, Any]) -> Covers | None:
    """Which modules a quantisation covers; None where that is not known."""
    method = table.get("quant_method") or next((name for key, name in KEYS.items() if key in table), None)
    reader = READERS.get(str(method).lower().replace("_", "-"))
    return reader(table) if reader else None


def _compressed_tensors(table: Mapping[str, Any]) -> Covers:
    match_name = library.part("utils.match", "match_name")
    table = {**table, **_table(table.get(INNER))}
    groups = _table(table.get("config_groups"))
    targets = [target for name, group in groups.items() for target in _targets(name, group)]
    by_class = any(target.isidentifier() for target in targets)
    ignore = _names(table.get("ignore"))

    def covers(module: str) -> bool:
        if any(match_name(module, name) for name in ignore):
            return False
        return by_class or any(match_name(module, target) for target in targets)

    return covers


def _targets(name: str, group: Any) -> list[str]:
    """What a group quantises: of a preset, by whose name it is called, there are the targets alone."""
    if not isinstance(group, dict):
        return [] if name.upper() == "UNQUANTIZED" else _names(group)
    if not group.get("weights"):
        return []
    return ["Linear"] if group.get("targets") is None else _names(group["targets"])


def _table(value: Any) -> Mapping[str, Any]:
    """Of several tables readers look at the first, so that in the others there may be anything."""
    return value if isinstance(value, dict) else {}


def _names(value: Any) -> list[str]:
    """Names and patterns, of which one stands for a list of it alone; what is neither says nothing."""
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [name for name in names if isinstance(name, str) and _is_sound(name)]


def _is_sound(name: str) -> bool:
    try:
        return not name.startswith("re:") or bool(re.compile(name.removeprefix("re:")))
    except (re.error, ValueError, OverflowError, RecursionError):
        return False


def _fp8(table: Mapping[str, Any]) -> Covers:
    left = frozenset(_names(table.get("modules_to_not_convert") or table.get("ignored_layers")))
    return lambda module: module not in left


def _all_but_rules(table: Mapping[str, Any]) -> Covers:
    """Of GPTQ, AWQ and auto-round, which leave out what `modules_to_not_convert` has a part of the name of."""
    left = _names(table.get("modules_to_not_convert"))
    return lambda module: not any(name in module for name in left)


def _modelopt(table: Mapping[str, Any]) -> Covers:
    """What `quantized_layers` names, or everything, but for what is excluded."""
    table = {**table, **_table(table.get("quantization"))}
    layers = _table(table.get("quantized_layers"))
    if not layers and not table.get("quant_algo"):
        return lambda module: False
    chosen = _among(layers) if layers else lambda module: True
    excluded = _among([*_names(table.get("ignore")), *_names(table.get("exclude_modules"))])
    return lambda module: chosen(module) and not excluded(module)


def _quark(table: Mapping[str, Any]) -> Covers:
    """What has a config with a weight, a layer's own or the usual one, and is not excluded."""
    layers = _table(table.get("layer_quant_config"))
    usual = [table.get("global_quant_config"), *_table(table.get("layer_type_quant_config")).values()]
    by_usual = any(_table(group).get("weight") for group in usual)
    quantised, spared = (
        _among(name for name, group in layers.items() if bool(_table(group).get("weight")) is has)
        for has in (True, False)
    )
    excluded = _among(_names(table.get("exclude")))
    return lambda module: not excluded(module) and (quantised(module) or (by_usual and not spared(module)))


def _mlx(table: Mapping[str, Any]) -> Covers:
    """What has scales."""
    return lambda module: True


def _among(names: Iterable[str]) -> Covers:
    """Whether a module is meant by one of the names and patterns, or one around it is, whatever is around a language model."""
    whole = {name for name in names if _is_sound(name)}
    patterns = [re.compile(name.removeprefix("re:")) for name in whole if name.startswith("re:")]
    globs = [name for name in whole if not name.startswith("re:") and any(sign in name for sign in "*?[")]

    def among(module: str) -> bool:
        words = [*dropwhile(WRAPPERS.__contains__, module.split("."))]
        around = {".".join(words[:end]) for end in range(1, len(words) + 1)}
        around |= {f"{outer}.{name}" for outer in OUTER for name in around}
        return (
            not whole.isdisjoint(around)
            or any(pattern.match(module) for pattern in patterns)
            or any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in around)
        )

    return among


# By quant_method; a new dialect has its reader here, which asks nothing of the room of dialects.
READERS: Mapping[str, Callable[[Mapping[str, Any]], Covers]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "mxfp8": _fp8,
    "mxfp4": _fp8,
    "gptq": _all_but_rules,
    "awq": _all_but_rules,
    "auto-round": _all_but_rules,
    **dict.fromkeys(("modelopt", "modelopt-fp4", "modelopt-mixed", "modelopt-mxfp8"), _modelopt),
    "quark": _quark,
    "mlx": _mlx,
}
