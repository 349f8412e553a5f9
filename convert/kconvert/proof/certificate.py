"""A certificate: the sha256 of every tensor and file of a checkpoint that `verify` has passed, and what each was held to.

A JSON object:

- `schema`, and `kconvert`: the version that wrote it;
- `standard` ("exact" or "limits"), `reference`: what the weights were held to, in words; `notes` of that check;
- `source`: `name`, and the digests of its `files` (config.json, the index) and of the `headers` of its safetensors files;
- `weights`: each weight's and plain tensor's outcome, see OUTCOMES; `not_compared`: tensors that belong to none of these;
- `tensors`: `dtype`, `shape` and `sha256` of the bytes of each tensor; `files`: the sha256 of config.json and each side file.
  Of a model in GGUF, whose files may have any name, each part is there by its number, with the sha256 of all in it that is no
  tensor.

It is not signed: whoever can write it can write another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kconvert.address import open_checkpoint, open_stored
from kconvert.checkpoint.files import is_directory, write_file
from kconvert.checkpoint.gguf_files import GgufCheckpoint, is_gguf
from kconvert.checkpoint.listing import CONFIG_NAME, INDEX_NAME
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.side_files import DECLARATION, why_left_out
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import CheckFailed, KconvertError, counted, explain_os_error
from kconvert.models.amx import is_amx, open_amx
from kconvert.proof.digests import file_digest, header_digests, tensor_digests
from kconvert.version import __version__

if TYPE_CHECKING:
    from kconvert.proof.verify import Report

SCHEMA = "kconvert-certificate-1"
MAX_BYTES = 1 << 28  # of the text; a model of 500,000 tensors has 120 MB
# What judged a weight -> what is true of it: its values are the source's; it is the reference encoding of these, or codes that
# give back each; its errors are within limits. PLANNED: its values are the source's but for groups that a conversion counts.
OUTCOMES = {"values": "exact values", "bytes": "exact bytes", "limits": "within limits"}
PLANNED = "exact but for planned groups"
KNOWN = (*OUTCOMES.values(), PLANNED)
Advance: TypeAlias = Callable[[int], None]
SHA256 = re.compile("[0-9a-f]{64}")
DTYPE = re.compile("[A-Z0-9_]{1,20}")
MOST_DIMENSIONS = 16
LONGEST = 1000  # characters of what is told


class Entry(NamedTuple):
    """What is certified of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Certificate:
    """What `check` needs of it; see above. `outcomes` counts weights and plain tensors by theirs."""

    version: str
    standard: str
    reference: str
    outcomes: Mapping[str, int]
    source: str
    tensors: Mapping[str, Entry]
    files: Mapping[str, str]
    not_compared: tuple[str, ...]


def certify(report: Report, path: str | os.PathLike[str], advance: Advance | None = None) -> str:
    """Write the certificate of a check that passed to `path`; returns the sha256 of its text.

    What of the output the check has not digested is read once more, see verify. CheckFailed when the check failed or the output
    has changed since it began; KconvertError when the check was of a sample, or `path` is something else than a certificate.
    `advance` is called with bytes read.
    """
    target = Path(path)
    check_path(target)
    if report.faults:
        raise CheckFailed(report.faults[0])
    if report.skipped:
        raise KconvertError(
            f"a certificate is of every tensor, but {counted(report.skipped, 'tensor')} were not compared; verify without a "
            "sample"
        )
    document = _document(report, target, advance or (lambda nbytes: None))
    _check_unchanged(report.output.checkpoint)
    text = (json.dumps(document, ensure_ascii=False) + "\n").encode()
    write_file(target, target.with_name(target.name + ".partial"), text)
    return hashlib.sha256(text).hexdigest()


def check_path(path: Path) -> None:
    """KconvertError unless a certificate can be written there."""
    if not path.parent.is_dir():
        raise KconvertError(f"{path.parent} is not a directory; make it first")
    try:
        if path.exists() and not path.read_bytes().startswith(b'{"schema": "kconvert-certificate'):
            raise KconvertError(f"{path} is there and is no certificate; choose another name")
    except OSError as error:
        raise explain_os_error(error, f"cannot read {path}") from None


def _document(report: Report, path: Path, advance: Advance) -> dict[str, Any]:
    source, output = report.source.checkpoint, report.output.checkpoint
    left = [tensor for tensor in output.tensors.values() if tensor.name not in report.digests]
    again = zip((tensor.name for tensor in left), tensor_digests(output, left, advance), strict=True)
    digests = {**report.digests, **dict(again)}
    weights, not_compared = _outcomes(report)
    return {
        "schema": SCHEMA,
        "kconvert": __version__,
        "standard": "exact" if report.standard.exact else "limits",
        "reference": report.reference,
        "notes": list(report.notes),
        "source": {
            "name": source.name,
            "files": {name: file_digest(source, name) for name in (CONFIG_NAME, INDEX_NAME) if source.has(name)},
            "headers": header_digests(source),
        },
        "output": output.name,
        "weights": weights,
        "not_compared": not_compared,
        "files": {title: file_digest(output, name) for title, name in _files(output, path).items()},
        "tensors": {
            name: Entry(tensor.dtype, tensor.shape, digests[name])._asdict() for name, tensor in output.tensors.items()
        },
    }


def _outcomes(report: Report) -> tuple[dict[str, str], list[str]]:
    """How each weight and plain tensor came out; and the output's tensors that belong to none of them, or were left unread."""
    from kconvert.proof.parity.compare import input_scales

    found = {item.name: PLANNED if item.changed else OUTCOMES[item.judged_by] for item in report.comparisons}
    formats = {comparison.name: comparison.source_format for comparison in report.comparisons}
    compared: list[Tensor] = []
    for weight in report.output.weights:
        kept = weight.format.quantised and formats.get(weight.name) == weight.format.label
        held = input_scales(weight) if report.standard.exact and weight.name in formats else ()
        compared += (*weight.tensors, *(weight.companions if kept else held))
    for plain in report.output.plain:
        compared.append(plain.tensor)
        if plain.tensor.name.removesuffix(".weight") not in found:
            found[plain.tensor.name] = OUTCOMES["bytes"]
    return found, _uncovered(report.output.checkpoint, compared)


def _uncovered(checkpoint: Checkpoint, compared: Iterable[Tensor]) -> list[str]:
    """The tensors whose bytes are not all in those that were compared, which may be matrices of a stack."""
    places = {(tensor.file, tensor.start, tensor.nbytes) for tensor in compared}
    covered: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for file, start, nbytes in sorted(places):
        covered[file].append((start, nbytes))
    ends = {file: [*accumulate((nbytes for _, nbytes in pieces), initial=0)] for file, pieces in covered.items()}

    def count(tensor: Tensor) -> int:
        pieces, sums = covered[tensor.file], ends.get(tensor.file, [0])
        first, last = (bisect_left(pieces, (end, 0)) for end in (tensor.start, tensor.start + tensor.nbytes))
        return sums[last] - sums[first]

    return [tensor.name for tensor in checkpoint.tensors.values() if count(tensor) < tensor.nbytes]


def _files(checkpoint: Checkpoint, certificate: Path) -> dict[str, str]:
    """The files besides weights and index that make a model what it is, by what they are called in a certificate; not that
    itself, if it lies there.

    Of a GGUF file what is no tensor does, which `file_digest` takes for it.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return {f"part {number} of {len(checkpoint.files)}": name for number, name in enumerate(checkpoint.files, 1)}
    names = [*checkpoint.side_files, *(file for file in checkpoint.left_out if why_left_out(file) == DECLARATION)]
    if checkpoint.has(CONFIG_NAME):
        names.append(CONFIG_NAME)
    if checkpoint.directory is not None:
        itself = certificate.resolve()
        names = [name for name in names if (checkpoint.directory / name).resolve() != itself]
    return {name: name for name in sorted(names)}


def _check_unchanged(checkpoint: Checkpoint) -> None:
    """CheckFailed when files are not those that were opened."""
    if checkpoint.directory is None:
        return
    for name, stat in checkpoint.files.items():
        now = (path := checkpoint.directory / name).stat()
        if f"{now.st_size}:{now.st_mtime_ns}" != stat.stamp:
            raise CheckFailed(f"{path} has changed while it was verified; verify it again")


def check_certificate(
    output: str | os.PathLike[str], certificate: str | os.PathLike[str], advance: Advance | None = None
) -> Certificate:
    """Hash the checkpoint `output` again, a directory or a Hub id; CheckFailed names the first thing that is not as certified.

    KconvertError when `certificate` is none, or nothing is in `output`. `advance` is called with bytes read.
    """
    wanted = read_certificate(Path(certificate))
    checkpoint = _open(output)
    _check_tables(checkpoint, wanted, Path(certificate))
    files = _files(checkpoint, Path(certificate))
    for title, digest in wanted.files.items():
        if file_digest(checkpoint, files[title]) != digest:
            part = "" if title == files[title] else ", in what is no tensor"
            raise CheckFailed(
                f"{checkpoint.root / files[title]} is not the file of the certificate, its sha256 differs{part}"
            )
    tensors = [*checkpoint.tensors.values()]
    with closing(tensor_digests(checkpoint, tensors, advance or (lambda nbytes: None))) as digests:
        for tensor, digest in zip(tensors, digests, strict=True):
            if digest != wanted.tensors[tensor.name].sha256:
                place = checkpoint.root / tensor.file
                raise CheckFailed(
                    f"{place}: tensor {tensor.name!r} is not the one of the certificate, its sha256 differs"
                )
    return wanted


def _open(output: str | os.PathLike[str]) -> Checkpoint:
    """What is there; CheckFailed where a directory is not sound."""
    path = Path(output)
    if not is_directory(output) and not is_gguf(output):
        return open_checkpoint(output)
    try:
        found = open_amx(path).checkpoint if is_amx(path) else open_stored(path)
        found.check_index()
    except KconvertError as error:
        raise CheckFailed(f"the checkpoint is not sound: {error}") from None
    return found


def _check_tables(checkpoint: Checkpoint, wanted: Certificate, certificate: Path) -> None:
    """CheckFailed for the first tensor or file that is missing, extra, or of another dtype or shape."""
    _check_names(checkpoint.title, "tensor", wanted.tensors, checkpoint.tensors)
    _check_names(checkpoint.title, "file", wanted.files, _files(checkpoint, certificate))
    for name, entry in wanted.tensors.items():
        tensor = checkpoint.tensors[name]
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            raise CheckFailed(
                f"{checkpoint.root / tensor.file}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, in the certificate "
                f"{entry.dtype} {list(entry.shape)}"
            )


def _check_names(root: Path, kind: str, certified: Collection[str], found: Collection[str]) -> None:
    for name in certified:
        if name not in found:
            raise CheckFailed(f"{root} lacks the {kind} {name!r} of the certificate")
    for name in found:
        if name not in certified:
            raise CheckFailed(f"{root} has the {kind} {name!r}, which is not in the certificate")


def read_certificate(path: Path) -> Certificate:
    """What `path` certifies; KconvertError, naming what is wrong, where it is no certificate."""
    try:
        if not path.is_file():
            raise KconvertError(f"{path} is not a file; give what `kconvert verify --certificate` has written")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise KconvertError(f"{path} has {size} bytes, over the limit of {MAX_BYTES}; this is no certificate")
        table = json.loads(path.read_bytes().decode(), object_pairs_hook=_unique)
    except OSError as error:
        raise explain_os_error(error, f"cannot read {path}") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "it is not valid JSON") from None
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise _damaged(path, f"its schema is not {SCHEMA}")
    source = table.get("source")
    return Certificate(
        _text(path, "kconvert", table.get("kconvert")),
        _one_of(path, "its standard", ("exact", "limits"), table.get("standard")),
        _text(path, "what it was held to", table.get("reference")),
        Counter(_one_of(path, "an outcome", KNOWN, word) for word in _table(path, table, "weights").values()),
        _text(path, "the name of its source", source.get("name") if isinstance(source, dict) else None),
        {name: _entry(path, name, entry) for name, entry in _table(path, table, "tensors").items()},
        {name: _digest(path, name, digest) for name, digest in _table(path, table, "files").items()},
        _names(path, table.get("not_compared")),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError
    return table


def _damaged(path: Path, what: str) -> KconvertError:
    return KconvertError(
        f"{path} is no certificate, or damaged: {what}; write it anew with `kconvert verify --certificate`"
    )


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > LONGEST:
        raise _damaged(path, f"{key} is missing or no text")
    return value


def _one_of(path: Path, key: str, words: Collection[str], value: Any) -> str:
    if not isinstance(value, str) or value not in words:
        raise _damaged(path, f"{key} is none of: {', '.join(words)}")
    return value


def _table(path: Path, table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = table.get(key)
    if not isinstance(found, dict):
        raise _damaged(path, f"it has no table {key!r}")
    return found


def _names(path: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _damaged(path, "not_compared is not a list of names")
    return tuple(value)


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != set(Entry._fields):
        raise _damaged(path, f"{name[:LONGEST]!r} is not described by dtype, shape and sha256")
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise _damaged(path, f"{name[:LONGEST]!r} has no dtype")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_is_size, shape)):
        raise _damaged(path, f"the shape of {name[:LONGEST]!r} is not a list of sizes")
    return Entry(dtype, tuple(shape), _digest(path, name, value["sha256"]))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _digest(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise _damaged(path, f"the sha256 of {name[:LONGEST]!r} is not 64 hexadecimal digits")
    return value
