"""Directories of AMX weights, as KTransformers loads them: their names, and the way back from files to weights.

Both forms, safetensors files and a tree of .kt files, are read whoever wrote them. Nothing in them says what they hold: the
method, the number of NUMA nodes and the shapes follow from the names and sizes of all tensors, and what kconvert left in
`kconvert.json` or in the headers must agree.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kconvert.checkpoint.directory import check_link
from kconvert.checkpoint.files import is_directory
from kconvert.checkpoint.listing import FileStat
from kconvert.checkpoint.safetensors import Tensor, read_header, read_metadata
from kconvert.checkpoint.source import Checkpoint, Reader, open_directory
from kconvert.errors import KconvertError, counted
from kconvert.formats.engines.amx import METHODS, TENSOR, Amx, N, Split
from kconvert.models.model import Weight, natural_key

RECORD = "kconvert.json"
PROJECTIONS: Mapping[str, Split] = {"gate": "rows", "up": "rows", "down": "cols"}
KT_GLOB = "_layer_*/_numa_*/*.kt"
KT_FILE = re.compile(rf"_layer_{N}/_numa_{N}/INT([48])_(gate|up|down)_{N}_([0-9]+)Byte_(quant|scale)_\.kt")
KT_KINDS = {"weight": "quant", "scale": "scale"}


@dataclass(frozen=True)
class AmxModel:
    """The routed experts of a model, gate and up [intermediate, hidden] and down [hidden, intermediate].

    `layers` maps each layer to its number of experts, `rest` are all other tensors, `record` is what kconvert noted.
    """

    checkpoint: Checkpoint
    bits: int
    numa: int
    hidden: int
    intermediate: int
    layers: Mapping[int, int]
    weights: tuple[Weight, ...]
    rest: tuple[Tensor, ...]
    record: Mapping[str, Any]

    @property
    def method(self) -> str:
        return f"AMXINT{self.bits}"

    @property
    def quantised_for(self) -> int:
        """The NUMA nodes whose shards of down got their scales; fewer than `numa` where shards were cut further."""
        known = str(self.record.get("quantised_for", ""))
        possible = (n for n in range(1, self.numa) if self.numa % n == 0)
        return next((n for n in possible if str(n) == known), self.numa)

    @property
    def form(self) -> str:
        return "kt" if next(iter(self.checkpoint.files)).endswith(".kt") else "safetensors"


def weight_name(layer: int, projection: str, expert: int) -> str:
    return f"blk.{layer}.ffn_{projection}_exps.{expert}"


def kt_path(tensor: str, bits: int, nbytes: int) -> str:
    """Where a tensor lies in the tree of .kt files."""
    match = TENSOR.fullmatch(tensor)
    assert match is not None, tensor
    _, layer, projection, expert, suffix, numa = match.groups()
    kind = KT_KINDS[suffix.rpartition(".")[2]]
    return f"_layer_{layer}/_numa_{numa}/INT{bits}_{projection}_{expert}_{nbytes}Byte_{kind}_.kt"


def is_amx(root: Path) -> bool:
    """Whether the directory holds AMX weights, by the names in its first file; a damaged one says nothing."""
    first = min(root.glob("*.safetensors"), default=None) if is_directory(root) else None
    if first is None:
        return any(root.glob(KT_GLOB))
    try:
        with Reader(root) as reader:
            entries = read_header(
                str(first), first.stat().st_size, lambda start, nbytes: reader.read(first.name, start, nbytes)
            )
    except (KconvertError, OSError):
        return False
    return any(TENSOR.fullmatch(entry.name) for entry in entries)


def open_amx(root: Path, *, glance: bool = False) -> AmxModel:
    """Read names and sizes of all tensors in `root`; KconvertError for whatever does not fit together.

    With a `glance` safetensors files are read only until one expert tells the sizes; `weights` and `layers` are its own.
    """
    if not is_amx(root):
        raise KconvertError(f"{root} holds no AMX weights; give a directory that repack-amx or kt-kernel has written")
    # Where there are both, KTransformers takes the safetensors files.
    enough = _one_expert() if glance else None
    checkpoint = open_directory(root, enough=enough) if any(root.glob("*.safetensors")) else _kt_checkpoint(root)
    experts: Mapping[str, dict[str, Tensor]] = defaultdict(dict)
    rest = []
    for name, tensor in checkpoint.tensors.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            rest.append(tensor)
        else:
            experts[match[1]][match[5]] = tensor
    if not experts:
        raise KconvertError(
            f"{root}: AMX weights lie in {min(root.glob('*.safetensors')).name} and others in {next(iter(checkpoint.files))}; "
            "put them into directories of their own"
        )
    if glance:
        stem = next(iter(experts)).partition(".ffn_")[0]
        experts = {name: parts for name, parts in experts.items() if name in _names(stem, 0)}
    bits, numa, hidden, intermediate = _sizes(checkpoint, experts)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    weights = tuple(
        _weight(checkpoint, name, experts[name], bits, numa, shapes) for name in sorted(experts, key=natural_key)
    )
    layers = _layers(checkpoint, weights)
    record = _record(checkpoint)
    model = AmxModel(checkpoint, bits, numa, hidden, intermediate, layers, weights, tuple(rest), record)
    for key, found in {"method": model.method, "numa": numa}.items():
        if key in record and str(record[key]) != str(found):
            raise KconvertError(
                f"{root}: its record says {key} {record[key]}, but the tensors are {found}; pack it anew"
            )
    return model


def _one_expert() -> Callable[[Iterable[Tensor]], bool]:
    """Whether the tensors so far have all of a layer's first expert: then they have some of the next, too."""
    seen: dict[str, None] = {}

    def enough(tensors: Iterable[Tensor]) -> bool:
        seen.update((match[1], None) for tensor in tensors if (match := TENSOR.fullmatch(tensor.name)))
        stem = next(iter(seen), "").partition(".ffn_")[0]
        return seen.keys() >= {*_names(stem, 0), *_names(stem, 1)}

    return enough


def _names(stem: str, expert: int) -> list[str]:
    return [f"{stem}.ffn_{projection}_exps.{expert}" for projection in PROJECTIONS]


def _kt_checkpoint(root: Path) -> Checkpoint:
    """The tree of .kt files as a checkpoint whose tensors are called as in the safetensors form."""
    tensors: dict[str, Tensor] = {}
    files: dict[str, FileStat] = {}
    methods = set()
    paths = sorted(root.glob(KT_GLOB))
    for link in (root / RECORD, *sorted({folder for path in paths for folder in path.parents[:2]}), *paths):
        if link.is_symlink():
            check_link(root, link)
    for path in paths:
        file, stat = str(path.relative_to(root)), path.stat()
        match = KT_FILE.fullmatch(file)
        if match is None:
            raise KconvertError(f"{path} has another name than kt-kernel gives its files; pack the weights anew")
        layer, numa, bits, projection, expert, stated, kind = match.groups()
        if stat.st_size != int(stated):
            raise KconvertError(f"{path} has {stat.st_size} bytes, its name says {stated}; pack it anew")
        methods.add(bits)
        scale = kind == "scale"
        name = f"{weight_name(int(layer), projection, int(expert))}.numa.{numa}.{'scale' if scale else 'weight'}"
        shape = (stat.st_size // 4 if scale else stat.st_size,)
        tensors[name] = Tensor(name, "F32" if scale else "I8", shape, file, 0, stat.st_size)
        files[file] = FileStat(stat.st_size, f"{stat.st_size}:{stat.st_mtime_ns}")
    if len(methods) > 1:
        raise KconvertError(f"{root} holds both INT4 and INT8 files; pack it anew into an empty directory")
    return Checkpoint(root, {}, tensors, files, {}, ())


def _sizes(checkpoint: Checkpoint, experts: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, int, int, int]:
    """Bits, NUMA nodes, hidden and intermediate size: a scale has as many elements as its shard has rows."""
    stem = next(iter(experts)).partition(".ffn_")[0]
    try:
        gate, down = experts[f"{stem}.ffn_gate_exps.0"], experts[f"{stem}.ffn_down_exps.0"]
        rows, hidden = gate["numa.0.scale"].nbytes // 4, down["numa.0.scale"].nbytes // 4
        bits = gate["numa.0.weight"].nbytes * 8 // max(rows * hidden, 1)
    except KeyError as error:
        raise KconvertError(
            f"{checkpoint.root}: the tensor {error.args[0]!r} of {stem}, expert 0, is missing; pack it anew"
        ) from None
    if bits not in METHODS.values():
        raise KconvertError(
            f"{gate['numa.0.weight']} has {gate['numa.0.weight'].nbytes} bytes, which is neither AMXINT4 nor AMXINT8 for "
            f"{rows} rows and a hidden size of {hidden}; pack it anew"
        )
    numa = len(gate) // 2
    return bits, numa, hidden, rows * numa


def _weight(
    checkpoint: Checkpoint,
    name: str,
    found: Mapping[str, Tensor],
    bits: int,
    numa: int,
    shapes: Mapping[str, tuple[int, int]],
) -> Weight:
    match = TENSOR.fullmatch(f"{name}.numa.0.weight")
    assert match is not None
    projection = match[3]
    rows, cols = shapes[projection]
    format = Amx(bits, numa, PROJECTIONS[projection])
    try:
        parts = format.parts(rows, cols)
    except ValueError as error:
        raise KconvertError(f"{checkpoint.root}: {name!r} [{rows}, {cols}] cannot be {format.label}: {error}") from None
    tensors = tuple(found[part.suffix] for part in parts if part.suffix in found)
    if len(tensors) != len(parts) or len(found) != len(parts):
        raise KconvertError(
            f"{checkpoint.root}: {name!r} has {counted(len(found), 'tensor')} in place of {len(parts)}; pack it anew"
        )
    for part, tensor in zip(parts, tensors, strict=True):
        if (tensor.dtype, tensor.nbytes) != (part.dtype, part.nbytes):
            raise KconvertError(
                f"{tensor} is {tensor.dtype} of {tensor.nbytes} bytes, but {format.label} of [{rows}, {cols}] for {numa} NUMA "
                f"nodes has {part.dtype} of {part.nbytes} there; pack it anew"
            )
    return Weight(name, f"expert.{projection}", rows, cols, format, tensors, int(match[2]), int(match[4]))


def _layers(checkpoint: Checkpoint, weights: tuple[Weight, ...]) -> dict[int, int]:
    """The number of experts of each layer, whose numbers must be 0 to that: the loader counts until one is missing."""
    found: dict[int, set[tuple[int, str]]] = defaultdict(set)
    for weight in weights:
        assert weight.layer is not None
        assert weight.expert is not None
        found[weight.layer].add((weight.expert, weight.role))
    layers = {}
    for layer, pairs in sorted(found.items()):
        layers[layer] = count = 1 + max(expert for expert, _ in pairs)
        if len(pairs) != count * len(PROJECTIONS):
            raise KconvertError(
                f"{checkpoint.root}: layer {layer} lacks weights of some of its {count} experts; pack it anew"
            )
    return layers


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What kconvert noted: in kconvert.json, or in the header of a file that was copied without it."""
    path = checkpoint.root / RECORD
    if path.is_file():
        try:
            record = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise KconvertError(f"{path} is not valid JSON; pack it anew") from None
        if not isinstance(record, dict):
            raise KconvertError(f"{path} is not a JSON object; pack it anew")
        return record
    file = next(iter(checkpoint.files))
    if file.endswith(".kt"):
        return {}
    with checkpoint.reader() as reader:
        return read_metadata(lambda start, nbytes: reader.read(file, start, nbytes))
