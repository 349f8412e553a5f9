"""config.json and the quantization_config in it, in every dialect that checkpoints come in.

Dialects: compressed-tensors (`config_groups`, `ignore`; https://github.com/vllm-project/compressed-tensors), kept at the
top level, under `text_config` (Kimi-K2.5) or as `compression_config` (old files).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kconvert.errors import KconvertError

KEYS = ("quantization_config", "compression_config")
NESTED = "text_config"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of one config group are quantised; field names and values are compressed-tensors' own."""

    format: str
    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    targets: tuple[str, ...] = ("Linear",)

    def __str__(self) -> str:
        size = f" {self.group_size}" if self.group_size else ""
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
        return re.match(pattern[3:], module) is not None
    return pattern == module


def quantization_tables(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every quantisation table of a config.json, in the order in which serving engines look for it."""
    nested = config.get(NESTED)
    candidates = [config.get(KEYS[0]), nested.get(KEYS[0]) if isinstance(nested, dict) else None, config.get(KEYS[1])]
    yield from (table for table in candidates if isinstance(table, dict) and table)


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig:
    """The quantisation that config.json declares; an empty one when it declares none."""
    table = next(quantization_tables(config), None)
    if table is None:
        return QuantizationConfig()
    method = table.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise KconvertError(f"config.json: quant_method {method!r} is not supported; supported: compressed-tensors")
    try:
        groups = table["config_groups"].values()
        schemes = tuple(_scheme(group, table.get("format", "")) for group in groups if group.get("weights"))
        ignore = _strings(table.get("ignore") or ())
        for pattern in (*ignore, *(target for scheme in schemes for target in scheme.targets)):
            re.compile(pattern.removeprefix("re:"))
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise KconvertError(f"config.json: its quantization_config is malformed ({error!r}); fetch it again") from None
    return QuantizationConfig(schemes, ignore)


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
        targets=_strings(group.get("targets") or ("Linear",)),
    )
    if scheme.strategy == "group" and (scheme.group_size or 0) <= 0:
        raise ValueError(f"group_size {size}")
    return scheme


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
