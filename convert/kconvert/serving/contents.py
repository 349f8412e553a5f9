"""What an engine finds in a directory, from its headers and config.json: the facts by which it takes it or not.

One layer with routed experts stands for all that have some: a checkpoint that is served has one encoding for its experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kconvert.checkpoint.gguf_files import SUFFIX as GGUF
from kconvert.checkpoint.listing import CONFIG_NAME
from kconvert.checkpoint.safetensors import Tensor, parse_header
from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects.registry import dialect_of
from kconvert.dialects.tables import declarations
from kconvert.errors import KconvertError
from kconvert.formats import from_scheme
from kconvert.formats.base import ACTIVATIONS, Scheme
from kconvert.formats.dense import DTYPES
from kconvert.formats.fp8 import Fp8
from kconvert.formats.packed import Packed
from kconvert.models.amx import AmxModel
from kconvert.models.catalogue import GENERIC, load_manifest, manifest_for
from kconvert.models.manifest import Manifest
from kconvert.models.mlx import SWITCH
from kconvert.models.mlx import is_name as is_mlx
from kconvert.models.model import Model, Weight, understand
from kconvert.models.roles import guess
from kconvert.models.sizes import SAME, lookup
from kconvert.planning.plan import Plan

PLAIN = frozenset({"bf16", "f16", "f32"})
LAYER = re.compile(r"(?:.*?\.)?layers\.[0-9]+\.")
# Last words of the roles of matrices that tensor parallelism cuts by rows, and by columns.
BY_ROWS = frozenset({"gate", "up", "q", "k", "v", "q_b", "kv_b"})
BY_COLUMNS = frozenset({"down", "o"})


@dataclass(frozen=True)
class Contents:
    """`kind` is safetensors, amx, gguf or mlx; `nbytes` are those of all its files.

    `encoding` is that of the routed experts (of the Linears, where there are none), `dialect` what declares it, `others` are
    the labels of the other Linears that are quantised; `expert` is the name of a matrix of an expert, `parts` are the suffixes
    of its tensors, `scale` is the dtype of its scales, `group` the number of columns that one is for, `density` its bytes for a
    value; `renamed`: the model has another name for that matrix. `width` is that of an expert, `hidden` the length of what
    goes into it, `sliced` has lengths of other quantised matrices that GPUs share, by name; `ragged` is a matrix in blocks
    of FP8 of which the last are cut off; `elsewhere` are labels of experts of other layers, where these are encoded otherwise.
    With `activations` the experts have scales of these. `architecture` is what a GGUF file calls its model, `numa` the number
    of nodes that AMX weights are split for.
    """

    kind: str
    config: Mapping[str, Any]
    nbytes: int
    encoding: str = "*"
    dialect: str = ""
    others: frozenset[str] = frozenset()
    expert: str = ""
    parts: str = ""
    scale: str = ""
    group: int = 1
    density: float = 0.0
    renamed: bool = False
    width: int = 0
    hidden: int = 0
    sliced: Mapping[str, int] = field(default_factory=dict)
    ragged: str = ""
    elsewhere: frozenset[str] = frozenset()
    activations: bool = False
    architecture: str = ""
    numa: int = 0

    @cached_property
    def manifest(self) -> Manifest:
        return manifest_for(self.config) if self.config else load_manifest(GENERIC)

    @property
    def encodings(self) -> str:
        """All that its Linears are quantised in, that of the experts first."""
        beside = (self.others | self.elsewhere) - {self.encoding}
        return " and ".join((self.encoding or "several encodings", *sorted(beside)))

    @property
    def experts(self) -> int | None:
        """The number of routed experts of a layer."""
        return self.number(self.manifest.dims.get("experts", ""), *SAME["experts"])

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @cached_property
    def section(self) -> Mapping[str, Any]:
        """config.json as its language model's keys are looked for."""
        try:
            return self.manifest.section(dict(self.config))
        except KconvertError:
            return self.config

    def number(self, *keys: str) -> int | None:
        """The first positive number that config.json has at one of these keys of the language model."""
        found = (lookup(self.section, key) for key in keys)
        return next((value for value in found if type(value) is int and value > 0), None)


def contents_of(checkpoint: Checkpoint) -> Contents:
    """Of a checkpoint of safetensors files, all of its tensors or those of some files; KconvertError as `kconvert.inspect`."""
    nbytes = sum(stat.nbytes for stat in checkpoint.files.values())
    dialect = _dialect(checkpoint.config)
    if dialect == "mlx" or any(map(is_mlx, checkpoint.tensors)):
        expert = next((name for name in checkpoint.tensors if holds_expert([name])), "")
        return Contents("mlx", checkpoint.config, nbytes, dialect=dialect, expert=expert)
    first = next((name for name in checkpoint.tensors if holds_expert([name])), "")
    coded = next((name for name, tensor in checkpoint.tensors.items() if is_coded(tensor)), first)
    model = understand(one_layer(checkpoint, coded), partial=True)
    experts = [weight for weight in model.weights if _is_expert(weight.role)]
    facts = _facts(model, experts or list(model.weights), experts)
    if not experts and not any(weight.format.quantised for weight in model.weights):
        dialect = ""  # what is declared is of weights that are not there
    elsewhere = {"bf16"} if layer_of(first) != layer_of(coded) else set()
    if dialect and experts and not model.findings:
        elsewhere |= _elsewhere(model, checkpoint.config, next(e for e in experts if e.name == facts["expert"]))
    return Contents("safetensors", checkpoint.config, nbytes, dialect=dialect, elsewhere=frozenset(elsewhere), **facts)


def _dialect(config: Mapping[str, Any]) -> str:
    """What declares the quantisation, by the first of its names; "" where nothing does."""
    manifest = manifest_for(config)
    if manifest.has_encoded_stacks(config):
        return str(manifest.stacked_method)
    tables = declarations(config)
    return dialect_of(tables[0]).METHODS[0] if tables else ""


def holds_expert(tensors: Iterable[str]) -> bool:
    """Whether a routed expert's matrix, or a stack of them, is among these."""
    return any(
        ("experts" in name and _is_expert(guess(name.rpartition(".")[0]).name)) or SWITCH.fullmatch(name)
        for name in tensors
    )


def is_coded(tensor: Tensor) -> bool:
    """Whether it is of a routed expert's matrix that is quantised."""
    return tensor.dtype not in DTYPES and holds_expert([tensor.name])


def is_plain(contents: Contents) -> bool:
    """Whether a quantisation is declared that these experts have no part in: those of other layers may."""
    return bool(contents.dialect) and contents.encoding in PLAIN


def layer_of(name: str) -> str:
    """The beginning of a name up to the layer's number and the dot behind it."""
    layer = LAYER.match(name)
    return layer[0] if layer else ""


def _elsewhere(model: Model, config: Mapping[str, Any], expert: Weight) -> set[str]:
    """Labels of this matrix of an expert in the layers to which config.json gives another scheme.

    Only a manifest tells which layers have experts.
    """
    manifest, layer = model.manifest, layer_of(expert.name)
    if not layer or not {"layers", "experts"} <= manifest.dims.keys():
        return set()
    names = manifest.bind(manifest.resize(dict(config), {"experts": (expert.expert or 0) + 1}))
    quantization = manifest.quantization(config)
    before, rest = layer.rstrip(".").rpartition(".")[0], expert.name[len(layer) :]
    schemes: dict[str, Scheme | None] = {}
    for name in (f"{before}.{number}.{rest}" for number in range(names.size("layers"))):
        if names.match(name) is not None:
            scheme = quantization.scheme_for(name, name.removeprefix(manifest.prefix))
            schemes[name] = None if scheme is None else replace(scheme, targets=())
    return {_label(scheme) for scheme in schemes.values() if scheme != schemes.get(expert.name)}


def _label(scheme: Scheme | None) -> str:
    if scheme is None:
        return "bf16"
    try:
        return from_scheme(scheme).label
    except ValueError:  # one that no weight is read by
        return scheme.format


def _is_expert(role: str) -> bool:
    return role.partition(".")[0] == "expert"


def one_layer(checkpoint: Checkpoint, expert: str, dense: bool = False) -> Checkpoint:
    """Of the checkpoint the layer of this expert, in a model without those behind it; all where there is none.

    With `dense` also the layers before it that have no experts, and what is in none.
    """
    layer, number = layer_of(expert), guess(expert.rpartition(".")[0]).layer
    if not layer or number is None:
        return checkpoint

    def stays(name: str) -> bool:
        if not dense or name.startswith(layer):
            return name.startswith(layer)
        return "experts" not in name and "switch_mlp" not in name and (guess(name).layer or 0) < number

    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if stays(name)}
    return replace(
        checkpoint, config=_up_to(number, manifest_for(checkpoint.config), checkpoint.config), tensors=tensors
    )


def _up_to(number: int, manifest: Manifest, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of as few layers as leave this one what it is: half a million names need not be made to look for a few."""
    if "layers" not in manifest.dims:  # a model of which no manifest knows the layers
        return config
    with suppress(KconvertError):  # nor config.json
        names = manifest.bind(config)
        for layers in range(number + 1, names.size("layers")):
            fewer = manifest.resize(config, {"layers": layers})
            if manifest.bind(fewer).kinds(number) == names.kinds(number):
                return fewer
    return config


def _facts(model: Model, meant: list[Weight], experts: list[Weight]) -> dict[str, Any]:
    """What the weights that count tell; the encoding is "" where they have several."""
    if not meant:
        return {"encoding": "bf16"}
    rest = [weight for weight in model.weights if weight.format.quantised and not _is_expert(weight.role)]
    labels = {weight.format.label for weight in meant if weight.format.quantised or experts}
    first = next((weight for weight in meant if weight.format.quantised), meant[0])
    last = next((weight for weight in meant if weight.role == "expert.down"), None)
    beside = {tensor.name for tensor in first.companions}
    return {
        "encoding": "" if len(labels) > 1 else first.format.label,
        "others": frozenset(weight.format.label for weight in rest) if experts else frozenset(labels),
        "expert": first.name,
        "parts": " ".join(tensor.name.rpartition(".")[2] for tensor in first.tensors),
        "scale": first.tensors[1].dtype if len(first.tensors) > 1 else "",
        "group": first.format.group_size or 1 if isinstance(first.format, Packed) else 1,
        "density": sum(tensor.nbytes for tensor in first.tensors) / max(1, first.rows * first.cols),
        "activations": any(f"{first.name}.{fact}" in beside for fact in ACTIVATIONS),
        "renamed": bool(experts) and _is_renamed(model, first.name),
        "width": last.cols if last is not None else 0,
        "hidden": last.rows if last is not None else 0,
        "sliced": dict(_sliced(rest)),
        "ragged": next((weight.name for weight in (*meant, *rest) if _is_ragged(weight)), ""),
    }


def _is_renamed(model: Model, name: str) -> bool:
    """Whether the model's manifest knows its experts by other names."""
    if not model.findings or model.manifest.accepts_any:
        return False
    return model.manifest.bind(model.checkpoint.config).match(name) is None


def _sliced(weights: Iterable[Weight]) -> Iterable[tuple[str, int]]:
    """Name and length of what GPUs share, of each of these that they cut."""
    for weight in weights:
        word = weight.role.rpartition(".")[2]
        if word in BY_ROWS or word in BY_COLUMNS:
            yield weight.name, weight.rows if word in BY_ROWS else weight.cols


def _is_ragged(weight: Weight) -> bool:
    return isinstance(weight.format, Fp8) and weight.format.is_ragged(weight.rows, weight.cols)


def contents_of_amx(model: AmxModel) -> Contents:
    """Of AMX weights; config.json is their source's, where somebody put it there."""
    nbytes = sum(stat.nbytes for stat in model.checkpoint.files.values())
    label = model.method.lower()
    return Contents(
        "amx",
        model.checkpoint.config,
        nbytes,
        label,
        width=model.intermediate,
        hidden=model.hidden,
        numa=model.numa,
    )


def contents_of_plan(plan: Plan) -> Contents:
    """Of what the plan writes."""
    nbytes = sum(shard.nbytes for shard in plan.shards)
    if plan.shards[0].name.endswith(GGUF):
        return Contents("gguf", {}, nbytes)
    config = json.loads(bytes(plan.texts.get(CONFIG_NAME, b"{}")))
    if "numa" in plan.facts:
        return Contents("amx", config, nbytes, str(plan.facts["to"]).lower(), numa=int(plan.facts["numa"]))
    tensors: dict[str, Tensor] = {}
    declared = _dialect(config)
    for shard in plan.shards:
        text = shard.header[8:]
        tensors |= {t.name: t for t in parse_header(shard.name, shard.nbytes, text, shard.name)}
        if any(map(is_coded, tensors.values())) or (not declared and holds_expert(shard.tensors)):
            break
    contents = contents_of(Checkpoint(Path(), config, tensors, {}, {}, ()))
    return replace(contents, nbytes=nbytes)
