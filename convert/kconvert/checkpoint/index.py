"""Which safetensors files are the model, and what its index says of them.

What the index names; without one the file model.safetensors, or else one file of any other name. Several files need their
index, which is written last: without it nothing says that they are complete. All others are left out, and said to be.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import count
from posixpath import normpath
from typing import TYPE_CHECKING

from kconvert.checkpoint.listing import INDEX_NAME, Listing, what_finishes
from kconvert.checkpoint.lookalikes import is_adapter_file, is_consolidated, what_it_is
from kconvert.errors import KconvertError

if TYPE_CHECKING:
    from kconvert.checkpoint.safetensors import Tensor

LONE_NAME = "model.safetensors"
SET_PREFIX = "model-"
NUMBERED = re.compile(r"(.*?)([0-9]{1,9})-of-([0-9]{1,9})\.safetensors", re.DOTALL)


def choose_files(listing: Listing) -> list[str]:
    """The model's files where there is no index; KconvertError where their names leave a doubt, or there is no model."""
    top = [file for file in listing.safetensors if "/" not in file]
    candidates = _candidates(file for file in top if not is_adapter_file(file) and not is_consolidated(file))
    named = {key: files for key, files in candidates.items() if key[0] in (LONE_NAME, SET_PREFIX)}
    chosen = named or candidates
    if not chosen:
        raise KconvertError(f"{listing.root} {what_it_is(listing)}")
    if len(chosen) > 1:
        raise KconvertError(
            f"{listing.root} holds {sum(map(len, chosen.values()))} safetensors files but no {INDEX_NAME}, which says what "
            f"belongs together ({' or '.join(map(_spelled, chosen.values()))}); put the files that are meant alone into a "
            "directory"
        )
    ((_, total), files) = chosen.popitem()
    if (help := what_finishes(listing.root)) and (len(files) > 1 or total):
        raise KconvertError(f"{listing.root} is unfinished, it has no {INDEX_NAME}; {help}")
    if total is not None and len(files) < total:
        raise KconvertError(f"{listing.root} lacks {_missing(files)} and {INDEX_NAME}; fetch them")
    if len(files) > 1:
        raise KconvertError(
            f"{listing.root} holds {len(files)} safetensors files but no {INDEX_NAME}, which says what is in which; fetch it, "
            "or have it written by whatever saves or converts them"
        )
    return files


def _candidates(files: Iterable[str]) -> dict[tuple[str, int | None], list[str]]:
    """(prefix, N) -> the files prefix-I-of-N; (name, None) -> the file of this name alone."""
    found: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    for file in files:
        match = NUMBERED.fullmatch(file)
        found[(file, None) if match is None else (match[1], int(match[3]))].append(file)
    return dict(found)


def _spelled(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"


def is_one_set(files: list[str]) -> bool:
    """Whether these are model-1-of-N to model-N-of-N, all of them and nothing else; what is in which is not in a name."""
    names = [match for match in map(NUMBERED.fullmatch, files) if match is not None]
    numbers = sorted(int(name[2]) for name in names)
    kinds = {(name[1], int(name[3])) for name in names}
    return len(kinds) == 1 and kinds.pop()[1] == len(files) and numbers == list(range(1, len(files) + 1))


def _missing(files: list[str]) -> str:
    """The first that a set lacks."""
    names = [match for match in map(NUMBERED.fullmatch, files) if match is not None]
    have = {int(name[2]) for name in names}
    number = next(number for number in count(1) if number not in have)
    return f"{names[0][1]}{number:0{len(names[0][2])}}-of-{names[0][3]}.safetensors"


def read_weight_map(listing: Listing) -> dict[str, str]:
    """Which tensor is in which file, as the index says; every such file is listed."""
    path = listing.root / INDEX_NAME
    weight_map = listing.json(INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise KconvertError(f"{path} has no weight_map; fetch it again")
    checked: set[str] = set()
    missing: dict[str, str] = {}
    for name, file in weight_map.items():
        if isinstance(file, str) and file in checked:
            continue
        if not isinstance(file, str) or not _is_inside(file):
            raise KconvertError(
                f"{path}: tensor {name!r} is said to be in {file!r}, outside the checkpoint; mend the index"
            )
        if normpath(file) != file:
            raise KconvertError(
                f"{path}: tensor {name!r} is said to be in {file!r}; spell that {normpath(file)!r} in the index"
            )
        checked.add(file)
        if file not in listing.files:
            missing[file] = name
    if missing:
        _refuse_missing(listing, missing, leftover=len(missing) == len(checked))
    return weight_map


def _is_inside(file: str) -> bool:
    return file.isprintable() and not file.startswith("/") and ".." not in file.split("/")


def _refuse_missing(listing: Listing, missing: Mapping[str, str], leftover: bool) -> None:
    """An index none of whose files is here, where others are, is another set's."""
    others = [file for file in listing.safetensors if "/" not in file]
    file, name = next(iter(missing.items()))
    if leftover and others:
        raise KconvertError(
            f"{listing.root / INDEX_NAME} is not of the files here: it names {_spelled(sorted(missing))}, none of which is "
            f"here, but {_spelled(others)} is; take the index away if that is the whole model"
        )
    raise KconvertError(f"{listing.root / file} is missing; the index says that it holds tensor {name!r}, fetch it")


def compare_index(listing: Listing, tensors: Mapping[str, Tensor], weight_map: Mapping[str, str]) -> None:
    """KconvertError unless the index places every tensor where it is."""
    for name, tensor in tensors.items():
        said = weight_map.get(name)
        if said == tensor.file:
            continue
        where = f"{listing.root / tensor.file}: tensor {tensor.name!r} is here but {INDEX_NAME}"
        if said:
            raise KconvertError(f"{where} places it in {said}; mend the index")
        other = _other_index(listing, tensor.name)
        if other:
            raise KconvertError(
                f"{where} does not name it, {other} does: the two share their files, and a checkpoint has its files for "
                "itself; save the one that is meant alone"
            )
        raise KconvertError(f"{where} does not name it; mend the index, which has to name all that its files hold")
    if len(weight_map) != len(tensors):
        missing = next(name for name in weight_map if name not in tensors)
        raise KconvertError(
            f"{listing.root / weight_map[missing]}: tensor {missing!r} is in {INDEX_NAME} but not in the file; they were not "
            "saved together, take both from one revision"
        )


def _other_index(listing: Listing, tensor: str) -> str | None:
    """Another index here that names the tensor."""
    for file in sorted(listing.top):
        if file != INDEX_NAME and ".index." in file and file.endswith(".json"):
            try:
                weight_map = listing.json(file).get("weight_map")
            except KconvertError:
                continue
            if isinstance(weight_map, dict) and tensor in weight_map:
                return file
    return None
