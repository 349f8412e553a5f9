"""What a manifest would have to say of a model that has none, from the names of its matrices."""

from __future__ import annotations

from collections import Counter

from kconvert.formats.dense import DTYPES
from kconvert.models.model import Model
from kconvert.models.roles import LAYERS


def missing_lines(model: Model) -> str:
    """The end of a sentence: the line for the matrices with a number beside that of the layer, of which there are most."""
    families = Counter(
        (_family(tensor.name.removesuffix(".weight")), tensor.shape)
        for tensor in (plain.tensor for plain in model.plain)
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in DTYPES
    )
    kind = model.checkpoint.config.get("model_type") or "this model"
    numbered = [family for family, _ in families.most_common() if "{expert}" in family[0]]
    if not numbered:
        return f"; no manifest knows {kind}, and no matrix has the number of an expert in its name"
    name, (rows, cols) = numbered[0]
    return (
        f"; no manifest knows {kind}, which would list them by lines such as "
        f'{{ role = "expert.up", name = "{name}", shape = ["{rows}", "{cols}"] }}'
    )


def _family(name: str) -> str:
    """The name with placeholders for its numbers: of a layer, and of an expert."""
    words, before = [], ""
    for word in name.split("."):
        is_number = word.isdecimal()
        words.append(("{layer}" if before in LAYERS else "{expert}") if is_number else word)
        before = word
    return ".".join(words)
