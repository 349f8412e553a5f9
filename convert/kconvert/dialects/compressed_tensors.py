"""compressed-tensors: `config_groups` of targets and how their weights are quantised, and `ignore`.

Source: https://github.com/vllm-project/compressed-tensors, `quantization/quant_config.py`, `quant_scheme.py`, `quant_args.py`.
What the library refuses is refused, or read where the tensors settle what is meant (a string for a list of one, `targets`
left out for every Linear); keys that say nothing of the weights are not looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kconvert.dialects.base import QuantizationConfig, both_names, matches
from kconvert.dialects.fields import (
    LANGUAGE_MODEL,
    PATTERN,
    SCALE_FORMAT,
    UE8M0,
    Table,
    bare_name,
    brief,
    powers_of_two,
)
from kconvert.dialects.presets import PRESETS
from kconvert.errors import KconvertError
from kconvert.formats.base import Scheme

NAME = "compressed-tensors"
METHODS: tuple[str, ...] = (NAME,)
INNER = "quantization_config"
SIGNS = frozenset({"config_groups", "sparsity_config", INNER})
# Formats that leave it to the group, or to what the group says, how its weights are stored.
NO_FORMATS = frozenset({"", "mixed-precision"})
UNREAD_FORMATS = {
    "sparse-bitmask": "sparse weights without their zeros",
    "sparse-24-bitmask": "2:4 sparse weights without their zeros",
    "marlin-24": "2:4 sparse weights in the order of Marlin's kernel",
}


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    if INNER in table:  # as transformers kept it once
        inner = table.table(INNER)
        table = replace(inner, values={"sparsity_config": table.values.get("sparsity_config"), **inner.values})
    _check_storage(table)
    if "sparsity_config" in table:
        _check_storage(table.table("sparsity_config"))
    if table.values.get("transform_config"):
        _check_transforms(table.table("transform_config").table("config_groups"))
    if "sparsity_config" in table and "config_groups" not in table:
        return QuantizationConfig()  # the zeros are stored as they are
    groups = table.table("config_groups")
    schemes: list[Scheme] = []
    spared: dict[str, None] = {}
    for name in groups.values:
        group = _group(groups, name)
        _check_storage(group)
        targets = group.names("targets") if "targets" in group else ("Linear",)
        if "weights" in group:
            scheme = _scheme(group, table.text("format", ""), targets)
            schemes.append(replace(scheme, powers=powers_of_two(table)))
            spared = {target: None for target in spared if target not in targets}
        else:
            spared |= dict.fromkeys(targets)
    return QuantizationConfig(tuple(schemes), table.names("ignore"), tuple(spared))


def entries(table: Table, names: Iterable[tuple[str, ...]]) -> Iterator[Mapping[str, Any] | None]:
    """The config group that says how each of these modules is quantised, by any of its names; None where none does."""
    table = table.table(INNER) if INNER in table else table
    groups = table.table("config_groups")
    found = read(table)
    said = [group.values for group in (_group(groups, name) for name in groups.values) if "weights" in group]
    formats = (scheme.format for scheme in found.schemes)
    whole = [{**values, "format": format} for values, format in zip(said, formats, strict=True)]
    numbers = {id(scheme): number for number, scheme in enumerate(found.schemes)}
    for module in names:
        scheme = found.scheme_for(*module)
        yield None if scheme is None else whole[numbers[id(scheme)]]


def _check_storage(table: Table) -> None:
    """KconvertError where the format is one that is not read."""
    format = table.text("format", "")
    if what := UNREAD_FORMATS.get(format):
        raise KconvertError(
            f"{table.place} has format {format!r} ({what}), which is not read; convert the dense checkpoint that it "
            "was made from"
        )


def _check_transforms(transforms: Table) -> None:
    """Rotations that are in the weights stay there; those of activations would be lost with the quantisation."""
    for name in transforms.values:
        for apply in transforms.table(name).tables("apply"):
            location = apply.text("location", "")
            if location not in ("weight_input", "weight_output"):
                raise KconvertError(
                    f"{apply.place} rotates activations while the model runs (location {brief(location)}), which no "
                    "other checkpoint can say; convert the checkpoint that it was made from"
                )


def _group(groups: Table, name: str) -> Table:
    """A config group; a list of targets stands for the preset that is called like the group."""
    if not isinstance(groups.values[name], list | str):
        return groups.table(name)
    preset = PRESETS.get(name.upper())
    if preset is None:
        raise groups.fault(name, "a table (a list of targets only if the group is called like a preset, as W4A16)")
    return replace(groups, values={**preset, "targets": list(groups.names(name))})


def _scheme(group: Table, default_format: str, targets: tuple[str, ...]) -> Scheme:
    weights = group.table("weights")
    size = weights.integer("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.text("strategy", inferred).lower()
    if strategy == "group" and (size is None or size <= 0):
        raise weights.fault("group_size", "a positive number (-1 for one scale a row)")
    block = weights.block("block_structure")
    if strategy == "block" and block is None:
        raise weights.fault("block_structure", "the size of a block, such as [128, 128],")
    format = group.text("format", "") or default_format
    return Scheme(
        format=_inferred_format(group, weights, size) if format in NO_FORMATS else format,
        num_bits=_bits(weights),
        type=weights.text("type", "int").lower(),
        symmetric=weights.flag("symmetric", True),
        strategy=strategy,
        group_size=size if strategy == "group" else None,
        block=block if strategy == "block" else None,
        targets=targets,
    )


def _bits(weights: Table) -> int:
    bits = weights.integer("num_bits") if "num_bits" in weights.values else 8
    if bits is None:
        raise weights.fault("num_bits", "a whole number")
    return bits


def _inferred_format(group: Table, weights: Table, size: int | None) -> str:
    """The library's `infer_module_format`."""
    bits, type = _bits(weights), weights.text("type", "int").lower()
    if type == "float" and (bits, size) in ((4, 32), (6, 32)):
        return f"mxfp{bits}-pack-quantized"
    if (type, bits, size) == ("float", 8, 32) and weights.text("scale_dtype", "").endswith("uint8"):
        return "mxfp8-quantized"
    if (type, bits, size) == ("float", 4, 16):
        return "nvfp4-pack-quantized"
    if "input_activations" in group:
        return f"{type}-quantized"
    return "pack-quantized" if type == "int" and 1 <= bits <= 8 else "naive-quantized"


def compressed_fp8_table(
    strategy: str, quantised: Iterable[str], unquantised: Iterable[str], powers: bool = False
) -> dict[str, Any]:
    """The presets FP8_BLOCK (strategy `block`) and FP8_DYNAMIC (`channel`), for these Linears.

    `powers`: of two are the scales; the library has no word for it and does not look at DeepSeek's.
    """
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: dict[str, Any] = {**common, "strategy": strategy, "dynamic": False}
    inputs: dict[str, Any] = {**common, "dynamic": True}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
        inputs.update(strategy="group", group_size=128)
    else:
        inputs.update(strategy="token")
    table = compressed_table(
        "float-quantized", {"weights": weights, "input_activations": inputs}, quantised, unquantised
    )
    return table | ({SCALE_FORMAT: UE8M0} if powers else {})


# What moonshotai's INT4 releases list since Kimi-K2-Thinking.
KIMI_IGNORE = ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")


def packed_table(group_size: int, quantised: Iterable[str], unquantised: Iterable[str]) -> dict[str, Any]:
    """`pack-quantized` INT4 as in Kimi-K2-Thinking; its patterns where they say just what is meant, see ignore_list."""
    quantised, unquantised = tuple(both_names(quantised)), tuple(unquantised)
    forms, names = _forms(quantised), both_names(unquantised)
    as_kimi = all(any(matches(name, pattern) for pattern in KIMI_IGNORE) for name in names)
    if as_kimi and not any(matches(form, pattern) for form in forms for pattern in KIMI_IGNORE):
        ignore = list(KIMI_IGNORE)
    else:
        ignore = _everywhere(forms, unquantised, quantised) if _is_inside(unquantised) else names
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}},
        "ignore": ignore,
    }


def int8_table(quantised: Iterable[str], unquantised: Iterable[str]) -> dict[str, Any]:
    """The preset INT8 (W8A8), for these Linears."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return compressed_table("int-quantized", {"weights": weights, "input_activations": inputs}, quantised, unquantised)


def mx_table(bits: int, quantised: Iterable[str], unquantised: Iterable[str]) -> dict[str, Any]:
    """The presets MXFP4A16 and MXFP8A16: quantised weights, and activations as they come."""
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    scales = {"dynamic": False, "scale_dtype": "torch.uint8"}
    format = "mxfp4-pack-quantized" if bits == 4 else "mxfp8-quantized"
    return compressed_table(format, {"weights": {**weights, **scales}}, quantised, unquantised)


def nvfp4_table(quantised: Iterable[str], unquantised: Iterable[str], activations: bool = False) -> dict[str, Any]:
    """The preset NVFP4A16: quantised weights, and activations as they come; or, where somebody has measured scales for
    `activations`, the preset NVFP4."""
    common = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    scales = {"scale_dtype": "torch.float8_e4m3fn"}
    group: dict[str, Any] = {"weights": {**common, "dynamic": False, **scales}}
    if activations:
        group["input_activations"] = {**common, "dynamic": "local", **scales}
    return compressed_table("nvfp4-pack-quantized", group, quantised, unquantised)


def compressed_table(
    format: str, group: Mapping[str, Any], quantised: Iterable[str], unquantised: Iterable[str]
) -> dict[str, Any]:
    """The dialect with one config group for all the Linears that are quantised."""
    return {
        "quant_method": NAME,
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": ignore_list(quantised, unquantised),
    }


def mixed_table(parts: Sequence[tuple[Mapping[str, Any], Sequence[str]]], unquantised: Sequence[str]) -> dict[str, Any]:
    """The dialect for several encodings: for each the table that it has alone, and its Linears."""
    everything = [name for _, names in parts for name in names]
    formats = {table["format"] for table, _ in parts}
    groups = {}
    ignore, loose = ignore_list(everything, unquantised), set(unquantised)
    named = [name for name in ignore if not name.startswith(PATTERN) and name in loose]
    for number, (table, names) in enumerate(parts):
        others = {*everything, *unquantised} - set(names)
        targets = patterns(names, others) if len(parts) > 1 else ["Linear"]
        groups[f"group_{number}"] = {**table["config_groups"]["group_0"], "targets": targets, "format": table["format"]}
    return {
        "quant_method": NAME,
        "format": "mixed-precision" if len(formats) > 1 else formats.pop(),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*(name for name in ignore if name.startswith(PATTERN)), *patterns(named, everything)],
    }


NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
AROUND = r"re:(model\.|language_model\.)*"  # whatever model there is around the language model


def patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Targets that hit these modules and none of the others: a pattern for all that differ in numbers only, if need be with
    those of their layers; names where that does not tell them apart."""
    alike = _by_template(map(bare_name, names))
    kinds = set(map(_kind, alike))
    unlike = _by_template(name for name in map(bare_name, others) if _kind(name) in kinds)
    targets: list[str] = []
    for template, members in alike.items():
        mine, theirs = _layers(members), _layers(unlike.get(template, ()))
        pattern = re.escape(template).replace(r"\#", "#")
        if template not in unlike:
            targets.append(f"{AROUND}{pattern.replace('#', '[0-9]+')}$")
        elif mine and mine.isdisjoint(theirs):
            layers = "|".join(sorted(mine, key=int))
            targets.append(f"{AROUND}{pattern.replace('#', f'({layers})', 1).replace('#', '[0-9]+')}$")
        else:
            targets += [f"{AROUND}{re.escape(name)}$" for name in members]
    return targets


def _by_template(names: Iterable[str]) -> dict[str, list[str]]:
    """The names by what they are but for their numbers."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[NUMBER.sub("#", name)].append(name)
    return dict(found)


def _kind(name: str) -> tuple[int, str]:
    """What names of one template have in common, seen without a look at every character."""
    last = name[name.rfind(".") + 1 :]
    return name.count("."), "#" if last.isdigit() else last


def _layers(names: Iterable[str]) -> set[str]:
    """The first number in each name that has one."""
    return {found[0] for found in map(NUMBER.search, names) if found}


# What llm-compressor's recipes for this architecture leave alone, in their words.
USUAL_IGNORE = ("lm_head", r"re:.*\.gate$", "re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$", "re:.*embed_tokens$")


def ignore_list(quantised: Iterable[str], unquantised: Iterable[str]) -> list[str]:
    """`ignore`: the usual patterns as far as they hit nothing quantised, and names for the rest.

    Of a language model inside a larger one each engine calls the modules otherwise, and cuts those beside it (a vision tower)
    otherwise, too: for these there are patterns alone, which hit them by every name.
    """
    quantised, unquantised = tuple(quantised), tuple(unquantised)
    forms = tuple(both_names(_forms(quantised)))
    usual = [pattern for pattern in USUAL_IGNORE if not any(matches(form, pattern) for form in forms)]
    rest = tuple(name for name in unquantised if not any(matches(name, pattern) for pattern in usual))
    return [*usual, *(_everywhere(forms, rest, quantised) if _is_inside(unquantised) else both_names(rest))]


def _is_inside(names: Iterable[str]) -> bool:
    """Whether these are a language model's inside a larger one."""
    return any(LANGUAGE_MODEL in name for name in names)


def _everywhere(forms: Collection[str], unquantised: Sequence[str], quantised: Iterable[str]) -> list[str]:
    """Patterns that hit these modules of a model inside a larger one, whatever an engine calls them, and none quantised."""
    beside = dict.fromkeys(bare_name(name).partition(".")[0] for name in unquantised)
    known = [PATTERN + rf".*{re.escape(word)}.*" for word in beside if word not in ("layers", "lm_head")]
    known = ["re:.*lm_head", *known, *KIMI_IGNORE[1:]]
    rest, chosen = unquantised, []
    for pattern in known:
        left = tuple(name for name in rest if not matches(name, pattern))
        if len(left) < len(rest) and not any(matches(form, pattern) for form in forms):
            chosen.append(pattern)
            rest = left
    return [*chosen, *patterns(rest, quantised)]


def _forms(names: Iterable[str]) -> Collection[str]:
    """The names with one number for all: what patterns without numbers hit of these, they hit of those."""
    return {NUMBER.sub("0", name) for name in names}
