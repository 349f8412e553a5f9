"""What a config.json says of weights that stay as they are, for that of the output, which says it in the same dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.listing import CONFIG_NAME
from kconvert.dialects import compressed_tensors, fp8, modelopt
from kconvert.dialects.registry import dialect_of
from kconvert.dialects.tables import declarations
from kconvert.errors import KconvertError
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.targets.base import Declared
from kconvert.targets.mixed.rules import COMPRESSED, MODELOPT

if TYPE_CHECKING:
    from kconvert.formats import Format
    from kconvert.models.model import Model, Weight


def declared(model: Model, weights: Sequence[Weight], layout: str) -> list[Declared]:
    """What is said of these weights, as the dialect `layout` has it; DeepSeek-V4's whole table where that is what stays.

    KconvertError where the source says it in another dialect.
    """
    if not weights:
        return []
    names = [weight.name for weight in weights]
    tables = declarations(model.checkpoint.config)
    dialect = dialect_of(tables[0]) if tables else None
    said: Iterable[Mapping[str, Any] | None]
    around: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    if dialect is compressed_tensors and layout == COMPRESSED:
        prefix = model.manifest.prefix
        said = compressed_tensors.entries(tables[0], ((name, name.removeprefix(prefix)) for name in names))
        around = _alone
    elif dialect is modelopt and layout == MODELOPT:
        said = modelopt.entries(tables[0], names)
    elif dialect is fp8 and layout == MODELOPT and is_deepseek_v4(model):
        left = {key: value for key, value in tables[0].values.items() if key not in fp8.EXPERTS_KEYS}
        said = [left] * len(names)
    else:
        first = weights[0]
        raise KconvertError(
            f"weight {first.name!r} cannot stay {first.format.label}, as {model.checkpoint.root} does not say that in the "
            f"dialect {layout}, as the output would; one of the recipe's encodings may keep its codes as well"
        )
    found: dict[int, tuple[Mapping[str, Any], list[str]]] = {}
    for name, entry in zip(names, said, strict=True):
        if entry is None:
            raise KconvertError(
                f"weight {name!r} cannot stay as it is, as {CONFIG_NAME} does not say how it is quantised; give it an encoding"
            )
        found.setdefault(id(entry), (entry, []))[1].append(name)
    return [(around(entry), together) for entry, together in found.values()]


def _alone(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of an output that has this config group and no other."""
    return {"format": group["format"], "config_groups": {"group_0": group}}


def is_deepseek_v4(model: Model) -> bool:
    return str(model.checkpoint.config.get("model_type")).startswith(fp8.DEEPSEEK_V4)


def check_deepseek_v4(weights: Iterable[tuple[Weight, Format | None, bool]]) -> None:
    """KconvertError unless a DeepSeek-V4 gets what can be said of it beside its FP8: experts in NVFP4, but for MTP's, and the
    rest as it is. Each weight comes with the encoding that a rule gives it, and whether it stays as it is."""
    for weight, encoding, stays in weights:
        is_expert = weight.role.partition(".")[0] == "expert"
        fits = (stays and (not is_expert or weight.name.startswith("mtp."))) or (
            is_expert and isinstance(encoding, Nvfp4)
        )
        if not fits and (weight.format.quantised or (encoding is not None and encoding.quantised)):
            raise KconvertError(
                f"weight {weight.name!r} of a DeepSeek-V4 would be {encoding.label if encoding else 'bf16'}, which no engine "
                'reads beside the FP8 that stays; "expert" = "nvfp4" and "*" = "keep" is what they read'
            )
