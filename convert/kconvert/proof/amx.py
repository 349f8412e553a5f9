"""AMX weights and the checkpoint that they were packed from as two models with the same names, for `verify` to compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kconvert.dialects import QuantizationConfig
from kconvert.errors import CheckFailed, KconvertError
from kconvert.formats.engines.amx import Amx
from kconvert.models.amx import AmxModel, open_amx, weight_name
from kconvert.models.experts import rest_of, routed_experts
from kconvert.models.model import Model, Weight, natural_key
from kconvert.models.sorting import Plain


def open_packed(original: Model, output: Path) -> tuple[Model, Model, tuple[str, ...]]:
    """What of `original` belongs into the AMX weights in `output`, called as there; these; and notes on what is compared.

    CheckFailed for whatever is unsound about `output`.
    """
    try:
        packed = open_amx(output)
    except KconvertError as error:
        raise CheckFailed(f"the output is not sound: {error}") from None
    plain = tuple(Plain(tensor, "rest") for tensor in packed.rest)
    weights = tuple(_as_scaled(weight, packed) for weight in packed.weights)
    found = Model(packed.checkpoint, original.manifest, QuantizationConfig(), weights, plain, ())
    return _expected(original, packed), found, tuple(_notes(packed))


def _expected(original: Model, packed: AmxModel) -> Model:
    """The routed experts; and if there is anything besides them, all the rest with the side files that went along."""
    weights = [weight._replace(name=_packed_name(weight)) for weight in routed_experts(original).weights]
    weights.sort(key=lambda weight: natural_key(weight.name))
    taken = packed.checkpoint.side_files if packed.rest else {}
    side_files = {name: size for name, size in original.checkpoint.side_files.items() if name in taken}
    return replace(
        original,
        checkpoint=replace(original.checkpoint, side_files=side_files),
        weights=tuple(weights),
        plain=tuple(rest_of(original)) if packed.rest else (),
    )


def _packed_name(weight: Weight) -> str:
    assert weight.layer is not None
    assert weight.expert is not None
    return weight_name(weight.layer, weight.role.partition(".")[2], weight.expert)


def _as_scaled(weight: Weight, packed: AmxModel) -> Weight:
    """The weight with what is known of how its scales were made."""
    assert isinstance(weight.format, Amx)
    mse = {"mse": True, "amax": False}.get(str(packed.record.get("scales")))
    return weight._replace(format=replace(weight.format, mse=mse, pieces=packed.numa // packed.quantised_for))


def _notes(packed: AmxModel) -> Iterator[str]:
    if not packed.rest:
        yield "only the routed experts are compared; the output holds nothing else"
    scales = packed.record.get("scales")
    known = scales in ("amax", "mse")
    yield (
        f"its record says that scales are by {scales}" if known else "nothing says whether scales are by amax or by mse"
    )
