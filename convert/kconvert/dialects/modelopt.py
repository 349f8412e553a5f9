"""ModelOpt: a `quant_algo` for all Linears that are not in `ignore`, or in mixed checkpoints for each of `quantized_layers`.

config.json has that as quantization_config, flat or below `quantization`; hf_quant_config.json, which engines read as well,
has it below `quantization` and calls `ignore` `exclude_modules`. Names are modules', whose insides they mean too
(`mlp.experts` for every expert's projections), with or without those of a model around the language model; others are the
shell's patterns. `config_groups` says the same in other words, and is not looked at.
Sources: https://github.com/NVIDIA/Model-Optimizer, `export/quant_utils.py`, `export/convert_hf_config.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from kconvert.dialects.base import EVERYTHING, QuantizationConfig, both_names, by_name
from kconvert.dialects.fields import LANGUAGE_MODEL, Table, bare_name, brief
from kconvert.errors import KconvertError
from kconvert.formats.base import Scheme

METHODS: tuple[str, ...] = ("modelopt", "modelopt-fp4", "modelopt-mixed", "modelopt-mxfp8")
INNER = "quantization"
SIGNS = frozenset({"quant_algo", "producer", "quantized_layers", INNER})
MIXED = "MIXED_PRECISION"
NVFP4 = Scheme("nvfp4", 4, "float", strategy="tensor_group", group_size=16, targets=EVERYTHING)
MXFP4 = Scheme("mxfp4", 4, "float", strategy="group", group_size=32, targets=EVERYTHING)
MXFP8 = replace(MXFP4, format="mxfp8-quantized", num_bits=8)
FP8 = Scheme("float-quantized", 8, "float", targets=EVERYTHING)
FP8_CHANNEL = replace(FP8, strategy="channel")
FP8_BLOCK = replace(FP8, strategy="block", block=(128, 128))
INT4 = Scheme("modelopt-int4", 4, "int", strategy="group", group_size=128, targets=EVERYTHING)
INT8 = Scheme("int-quantized", 8, "int", strategy="channel", targets=EVERYTHING)
# What follows W4A8_ and its like is about activations. In capitals as engines know it, or as ModelOpt has no name for it.
ALGORITHMS: Mapping[str, Scheme] = {
    **dict.fromkeys(("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_STATIC"), NVFP4),
    **dict.fromkeys(("MXFP4", "W4A8_MXFP4_FP8"), MXFP4),
    "MXFP8": MXFP8,
    "FP8": FP8,
    **dict.fromkeys(("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PC_PT"), FP8_CHANNEL),
    **dict.fromkeys(("FP8_PB_WO", "FP8_PB_REAL"), FP8_BLOCK),
    **dict.fromkeys(("W4A16_AWQ", "INT4_AWQ"), INT4),
    **dict.fromkeys(("W8A16", "W8A8_SQ_PER_CHANNEL"), INT8),
}


def read(table: Table) -> QuantizationConfig:
    """See base.Dialect."""
    if INNER in table:
        table = table.table(INNER)
    if "quant_algo" not in table.values and "quantized_layers" not in table:
        raise table.fault("quant_algo", "the name of an algorithm")
    ignore = (*table.globs("ignore"), *table.globs("exclude_modules"))
    if table.text("quant_algo", MIXED if "quantized_layers" in table else "").upper() == MIXED:
        return QuantizationConfig(_by_layer(table.table("quantized_layers")), ignore, inside=True)
    scheme = _scheme(table)
    return QuantizationConfig((scheme,) if scheme else (), ignore, inside=True)


def _by_layer(layers: Table) -> tuple[Scheme, ...]:
    """A scheme for each algorithm, whose targets are the modules that have it."""
    schemes = ((name, _scheme(layers.table(name))) for name in layers.values)
    return by_name((layers.target(name), scheme) for name, scheme in schemes if scheme is not None)


def _scheme(table: Table) -> Scheme | None:
    """What the table's algorithm makes of a weight; None where it leaves weights alone."""
    name = table.text("quant_algo", "")
    if not name:
        return None
    scheme = ALGORITHMS.get(name.upper())
    if scheme is None:
        raise KconvertError(
            f"{table.place_of('quant_algo')} is {brief(name)}, which is not read; convert the checkpoint that it was made from"
        )
    size = table.integer("group_size") or 0  # 0 stands for none
    if size < 0:
        raise table.fault("group_size", "a positive number")
    if size and scheme.block:
        return replace(scheme, block=(size, size))
    return replace(scheme, group_size=size) if size and scheme.group_size else scheme


# What an engine fuses under another name these patterns hit as well.
USUAL_IGNORE = (
    "lm_head",
    "*self_attn*",
    "*.attn.*",
    "*shared_expert*",
    "*mlp.gate",
    "*block_sparse_moe.gate",
    "*vision_tower*",
)
PRODUCER = {"name": "modelopt"}  # by which engines know the file
BESIDE = "hf_quant_config.json"
FLOAT4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}


def nvfp4_table(quantised: Iterable[str], unquantised: Iterable[str]) -> dict[str, Any]:
    """One `quant_algo`, NVFP4, for all Linears but those in `ignore`; where SGLang calls modules otherwise than the file does,
    it finds them by `quantized_layers` only."""
    quantised = list(quantised)
    if any(name.startswith(LANGUAGE_MODEL) and RESPELT[0] in name for name in quantised):
        return mixed_table([(entry("NVFP4"), quantised)], unquantised)
    group = {"input_activations": FLOAT4, "weights": FLOAT4, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group},
        "ignore": _ignore(quantised, unquantised),
        "quant_algo": "NVFP4",
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


# What engines' code calls modules of Kimi-K3, and Linears whose rows it puts into one.
RESPELT = ("block_sparse_moe", "mlp")
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def entry(algorithm: str) -> dict[str, Any]:
    """What `quantized_layers` says of a module."""
    return {"quant_algo": algorithm, **({"group_size": FLOAT4["group_size"]} if algorithm == "NVFP4" else {})}


def entries(table: Table, names: Iterable[str]) -> Iterator[Mapping[str, Any] | None]:
    """What a table says of each of these modules, in the words of `quantized_layers`; None where it says nothing."""
    table = table.table(INNER) if INNER in table else table
    layers = table.table_if_any("quantized_layers").values
    algorithm = table.text("quant_algo", MIXED)
    usual = entry(algorithm) | {"group_size": size} if (size := table.values.get("group_size")) else entry(algorithm)
    targets = {table.target(name): said for name, said in layers.items()} if layers else {EVERYTHING[0]: usual}
    found = QuantizationConfig(
        tuple(Scheme(str(n), targets=(target,)) for n, target in enumerate(targets)), inside=True
    )
    said = list(targets.values())
    for name in names:
        scheme = found.scheme_for(name)
        yield None if scheme is None else said[int(scheme.format)]


def mixed_table(
    quantised: Iterable[tuple[Mapping[str, Any], Sequence[str]]], unquantised: Iterable[str]
) -> dict[str, Any]:
    """MIXED_PRECISION: Linears by what is said of them, experts by the module that has them all, under every name that engines
    use."""
    unquantised = list(unquantised)
    said = {name: entry for entry, names in quantised for name in names}
    inside: dict[str, set[int]] = defaultdict(set)
    for name in (*said, *unquantised):
        inside[_experts_of(name)].add(id(said.get(name)))
    layers: dict[str, Mapping[str, Any]] = {}
    for name, entry in said.items():
        whole = _experts_of(name) if len(inside[_experts_of(name)]) == 1 else name
        if whole not in layers:
            layers |= dict.fromkeys(_spellings(whole), entry)
    for fused, parts in FUSED.items():
        for name in [name for name in layers if name.endswith(f".{parts[0]}")]:
            around = name.removesuffix(parts[0])
            if all(layers.get(around + part) == layers[name] for part in parts):
                layers[around + fused] = layers[name]
    return {
        "quantized_layers": layers,
        "ignore": _ignore(said, unquantised),
        "quant_algo": MIXED,
        "producer": PRODUCER,
        "quant_method": "modelopt_mixed",  # else SGLang leaves out what is not FP8
    }


def _experts_of(name: str) -> str:
    """The module that has the routed experts of whose one this is; the name of any other."""
    around, experts, _ = name.rpartition(".experts.")
    return around + experts.rstrip(".") if experts else name


def _spellings(name: str) -> list[str]:
    """A module's names in engines."""
    shorter = both_names([name])
    shorter += [bare_name(name)] if name.startswith(LANGUAGE_MODEL) else []
    return [*dict.fromkeys(word for name in shorter for word in (name, name.replace(*RESPELT)))]


def table_beside(table: Mapping[str, Any]) -> dict[str, Any]:
    """hf_quant_config.json, which says the same as the quantization_config `table`: TensorRT-LLM reads no other."""
    said: dict[str, Any] = {"quant_algo": table["quant_algo"], "kv_cache_quant_algo": None}
    if "quantized_layers" in table:
        said["quantized_layers"] = table["quantized_layers"]
    else:
        said |= {"group_size": FLOAT4["group_size"], "exclude_modules": table["ignore"]}
    return {"producer": PRODUCER, "quantization": said}


def _ignore(quantised: Iterable[str], unquantised: Iterable[str]) -> list[str]:
    """`ignore`: the usual patterns as far as they hit something, and nothing quantised; names for the rest."""
    quantised, unquantised = both_names(quantised), both_names(unquantised)
    hit = {pattern: [name for name in unquantised if fnmatchcase(name, pattern)] for pattern in USUAL_IGNORE}
    sound = [p for p, names in hit.items() if names and not any(fnmatchcase(name, p) for name in quantised)]
    covered = {name for pattern in sound for name in hit[pattern]}
    return [*sound, *(name for name in unquantised if name not in covered)]
