"""A recipe in a file: which weights get which encoding, by role or by a glob of names; the first rule that fits counts.

    layout = "modelopt"

    [encodings]
    "model.layers.0.*" = "bf16"
    "attention" = "fp8"
    "expert" = "nvfp4"
    "*" = "keep"

A role is as `kconvert inspect` has it, `attention.o`, or its first word for all of that kind. What has `*`, `?` or `[` is a
glob of whole names of weights. Weights that no rule names become BF16 where they are quantised and stay as they are otherwise;
those to `keep` stay as they are, with what config.json says of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kconvert.dialects.fields import brief
from kconvert.errors import KconvertError, explain_os_error
from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from kconvert.models.model import Weight

Matcher: TypeAlias = "Callable[[Weight], bool]"
COMPRESSED, MODELOPT = "compressed-tensors", "modelopt"
BF16 = {"bf16": Dense("BF16")}
KEEP = "keep"  # in the place of an encoding: that of the source
# What each dialect can say of a weight, by the words that follow a rule.
ENCODINGS: Mapping[str, Mapping[str, Format]] = {
    COMPRESSED: {
        **BF16,
        "nvfp4": Nvfp4(),
        "fp8": Fp8("channel", scale_name="weight_scale", scale_dtype="BF16"),
        "fp8-block": Fp8("block", scale_name="weight_scale", scale_dtype="BF16"),
        "mxfp4": Mx(4),
        "mxfp8": Mx(8),
        "int4": Packed(32),
        "int8": Int8(),
    },
    MODELOPT: {**BF16, "nvfp4": Nvfp4(True, inputs=True), "fp8": Fp8("tensor", scale_name="weight_scale", inputs=True)},
}
SIGNS = "*?["
RECORD = "recipe.toml"


@dataclass(frozen=True)
class Mix:
    """`rules` are (role or glob, word of ENCODINGS[layout]); `option`: given in place of a recipe."""

    layout: str
    rules: tuple[tuple[str, str], ...]
    option: str = field(default="", compare=False, repr=False)

    @property
    def whose(self) -> str:
        """What a sentence about one of its rules begins with."""
        return f"of {self.option}, the rule" if self.option else "the recipe's"

    @property
    def text(self) -> str:
        """The recipe as a file has it."""
        rules = "".join(f"{_quoted(selector)} = {_quoted(word)}\n" for selector, word in self.rules)
        return f"layout = {_quoted(self.layout)}\n\n[encodings]\n{rules}"


def read_mix(source: str | Path, layout: str = "") -> Mix:
    """The recipe in a file, or the preset of this name; in this layout if there is one, which the file's gives way to.

    KconvertError, naming the key, where it makes no sense.
    """
    presets = {path.name.removesuffix(".toml"): path for path in _preset_files() if path.name.endswith(".toml")}
    try:
        text = presets[str(source)].read_text() if str(source) in presets else Path(source).read_text("utf-8")
    except UnicodeDecodeError:
        raise KconvertError(f"{source} is no text in UTF-8; a recipe is a TOML file") from None
    except OSError as error:
        raise explain_os_error(
            error, f"cannot read the recipe {source} (the presets are {', '.join(sorted(presets))})"
        ) from None
    return parse_mix(text, str(source), layout)


def _preset_files() -> list[Any]:
    return [*(files("kconvert.targets.mixed") / "presets").iterdir()]


def parse_mix(text: str, source: str, layout: str = "") -> Mix:
    """The recipe that this TOML is; `source` is what sentences call it."""
    table = _toml(text, source)
    if unknown := sorted(table.keys() - {"layout", "encodings"}):
        raise KconvertError(f"{source}: the key {unknown[0]!r} is not known; a recipe has layout and encodings")
    layout = layout or table.get("layout", COMPRESSED)
    if not isinstance(layout, str) or layout not in ENCODINGS:
        raise KconvertError(f"{source}: layout is {brief(layout)}; it is {' or '.join(ENCODINGS)}")
    rules = table.get("encodings")
    if not isinstance(rules, dict) or not rules:
        raise KconvertError(f'{source}: encodings is no table of roles and globs, such as "expert" = "nvfp4"')
    for selector, word in rules.items():
        if word != KEEP and (not isinstance(word, str) or word not in ENCODINGS[layout]):
            raise KconvertError(
                f"{source}: encodings.{selector!r} is {brief(word)}, which {layout} has no word for; it has "
                f"{', '.join((*ENCODINGS[layout], KEEP))} (write a name with dots in quotes)"
            )
    return Mix(layout, tuple(rules.items()))


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        table: dict[str, Any] = tomllib.loads(text)
        return table
    except (ValueError, RecursionError):
        raise KconvertError(
            f'{source} is no TOML; a recipe has lines such as "expert" = "nvfp4" below [encodings], each once'
        ) from None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def matcher(selector: str) -> Matcher:
    """Whether a weight has this role, or a name that this glob matches."""
    if not is_glob(selector):
        return lambda weight: is_within(weight.role, selector)
    match = re.compile(translate(selector)).match
    return lambda weight: match(weight.name) is not None


def is_glob(selector: str) -> bool:
    return any(sign in selector for sign in SIGNS)


def is_within(role: str, selector: str) -> bool:
    return role == selector or role.startswith(f"{selector}.")
