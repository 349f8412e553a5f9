"""What of a model belongs into a directory that mlx-lm loads, called and shaped as it is read from there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from kconvert.checkpoint.listing import CONFIG_NAME
from kconvert.checkpoint.source import Checkpoint
from kconvert.dialects.mlx import SIGNS as SIGNS_OF_MLX
from kconvert.dialects.tables import KEYS, MLX_KEY
from kconvert.formats.dense import Dense
from kconvert.formats.engines.mlx import HALVES
from kconvert.formats.engines.turns import Turns
from kconvert.models.model import Model, Weight, natural_key
from kconvert.models.sorting import Plain

# What a header of its files says, before all tensors.
METADATA = re.compile(rb'"__metadata__" ?: ?{[^{}]*"format" ?: ?"mlx"')
BEGINNING = 4096  # bytes
# What only MLX calls its tensors so.
SIGNS = re.compile(rf"\.(?:switch_mlp|{'|'.join(HALVES)})\.")
MTP_NOTE = (
    "layers that predict further tokens (MTP) are not compared; mlx-lm does not load them, and the output has none"
)


def expected(original: Model, converted: Model) -> tuple[Model, tuple[str, ...]]:
    """`original` as it should be in `converted`, and notes on what is not compared; itself where that is not MLX's.

    Only layers that follow the last one may be missing, and those altogether.
    """
    if not is_mlx(converted):
        return original, ()
    biases = {w.name for w in converted.weights if isinstance(w.format, Turns) and isinstance(w.format.format, Dense)}
    columns = [_column(plain) for plain in original.plain if plain.tensor.name in biases]
    plain = tuple(item for item in original.plain if item.tensor.name not in biases)
    weights = sorted((*original.weights, *columns), key=lambda weight: natural_key(weight.name))
    adapted = replace(original, weights=tuple(weights), plain=plain)
    layers = _layers(converted)
    before: list[Weight | Plain] = [*original.weights, *original.plain]
    after: list[Weight | Plain] = [*converted.weights, *converted.plain]
    if not any(_is_spare(item, layers) for item in before) or any(_is_spare(item, layers) for item in after):
        return adapted, ()
    kept = tuple(weight for weight in weights if not _is_spare(weight, layers))
    return replace(adapted, weights=kept, plain=tuple(p for p in plain if not _is_spare(p, layers))), (MTP_NOTE,)


def is_mlx(model: Model) -> bool:
    """Whether a checkpoint is one of MLX's: by its config.json, by stacks and halves of kv_b as only it has them, or by what
    its files say."""
    checkpoint = model.checkpoint
    return (
        MLX_KEY in checkpoint.config or any(SIGNS.search(name) for name in checkpoint.tensors) or _says_so(checkpoint)
    )


def _says_so(checkpoint: Checkpoint) -> bool:
    """Whether the first file with weights does."""
    name = next(iter(checkpoint.files), "")
    if not name.endswith(".safetensors"):
        return False
    with checkpoint.reader() as reader:
        beginning = reader.read(name, 0, min(BEGINNING, checkpoint.files[name].nbytes))
    return METADATA.search(beginning) is not None


def misdeclared(checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence for each quantised module whose shapes are not those of what config.json says of it, or of all; or one where
    it does not say it to mlx-lm."""
    usual = checkpoint.config.get(MLX_KEY)
    if not isinstance(usual, dict):
        legacy = checkpoint.config.get(KEYS[0])
        if isinstance(legacy, dict) and SIGNS_OF_MLX & legacy.keys() and "quant_method" not in legacy:
            yield (
                f"{checkpoint.root / CONFIG_NAME} has no {MLX_KEY!r}, by which mlx-lm loads quantised weights; copy "
                f"{KEYS[0]} to that key"
            )
        return
    for name, scales in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        codes = checkpoint.tensors.get(f"{module}.weight")
        if last != "scales" or codes is None or codes.dtype != "U32" or not codes.shape or not scales.shape:
            continue
        own = usual.get(module)
        table = own if isinstance(own, dict) else usual
        mode, bits, group = (table.get(key) for key in ("mode", "bits", "group_size"))
        columns = codes.shape[-1] * 32
        is_affine = f"{module}.biases" in checkpoint.tensors
        if (mode in (None, "affine")) is not is_affine or (
            isinstance(bits, int) and isinstance(group, int) and columns != scales.shape[-1] * group * bits
        ):
            yield (
                f"{checkpoint.root / scales.file}: tensor {name!r} is {list(scales.shape)} beside codes {list(codes.shape)}, "
                f"which is not {mode or 'affine'} of {bits} bits in groups of {group}, as {CONFIG_NAME} declares it"
            )


def _layers(model: Model) -> float:
    config = model.checkpoint.config
    text = config.get("text_config")
    counts = [table.get("num_hidden_layers") for table in (text, config) if isinstance(table, dict)]
    return next((count for count in counts if isinstance(count, int)), math.inf)


def _is_spare(item: Weight | Plain, layers: float) -> bool:
    return item.role.startswith("mtp") or (item.layer is not None and item.layer >= layers)


def _column(plain: Plain) -> Weight:
    """A plain tensor as a weight of one column."""
    tensor = plain.tensor
    return Weight(tensor.name, plain.role, math.prod(tensor.shape), 1, Dense(tensor.dtype), (tensor,), plain.layer)
