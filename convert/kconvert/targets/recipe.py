"""What the user asked for: the target encoding and what decides the output's bytes. Nothing about how it is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kconvert.errors import KconvertError
from kconvert.formats.conventions import CONVENTIONS, KIMI
from kconvert.formats.engines.mlx import Affine
from kconvert.formats.packed import Packed
from kconvert.targets.base import ATTENTIONS, DEFAULT_SHARD_SIZE, MIXED, POWERS, RESTS, SCALES, WIDE, Target
from kconvert.targets.mixed.rules import ENCODINGS, KEEP, Mix, read_mix
from kconvert.targets.mixed.target import mixed_target
from kconvert.targets.registry import TARGETS, layouts_of, targets_for

if TYPE_CHECKING:
    from kconvert.formats import Format
    from kconvert.models.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Recipe:
    """`to` is one of registry.TARGETS and `layout` one of its layouts for the model, "" for the first of them; or `to` is MIXED
    and `mix` says which weights become what, see targets.mixed.rules.

    `source`, when given, is what the quantised weights must be (`int4`), or `bf16` for none; else any will do.
    `shard_size` is the most bytes of tensors in an output file, unless one weight has more; `include` and `exclude` are globs
    of names of weights and tensors.
    `convention` and `group_size` (columns to a scale, a multiple of 8) are for the target `int4`; `scales` also for
    `fp8`, `mxfp4`, `mxfp8` and `nvfp4`: one of base.SCALES, or base.POWERS for `fp8` alone, base.WIDE for `mlx` alone; see
    formats.packed, formats.fp8, formats.mx, formats.nvfp4 and formats.engines.mlx. With `require_exact` an output has every
    value of its source, or there is none. `rest`, for `gguf`, is what matrices become whose codes it does not take: one of
    base.RESTS; `attention`, for `nvfp4`, is what it becomes: one of ATTENTIONS.
    KconvertError for a value that is not possible.
    """

    to: str
    source: str | None = None
    shard_size: int = DEFAULT_SHARD_SIZE
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layout: str = ""
    convention: str = KIMI.name
    group_size: int = 32
    require_exact: bool = False
    scales: str = "amax"
    rest: str = RESTS[0]
    attention: str = ATTENTIONS[0]
    mix: Mix | None = None

    def __post_init__(self) -> None:
        self._check_target()
        if self.shard_size <= 0:
            raise KconvertError(f"a shard size of {self.shard_size} bytes is not possible; the default is 5GB")
        if self.convention not in CONVENTIONS:
            raise KconvertError(f"there is no convention {self.convention!r}; there are {', '.join(CONVENTIONS)}")
        if self.group_size <= 0 or self.group_size % 8:
            raise KconvertError(f"a group size of {self.group_size} is not possible; it is a multiple of 8, mostly 32")
        if self.rest not in RESTS or (self.rest != RESTS[0] and self.to != "gguf"):
            raise KconvertError(
                f"the rest as {self.rest!r} is not possible for {self.to}; for gguf it is {' or '.join(RESTS)}"
            )
        self._check_rules()
        self._check_scales()

    @property
    def _written(self) -> tuple[Format, ...]:
        """The encodings that may be written, by no rules yet."""
        if self.mix is not None:
            return tuple(ENCODINGS[self.mix.layout][word] for _, word in self.mix.rules if word != KEEP)
        return ((TARGETS[self.to].get(self.layout) or next(iter(TARGETS[self.to].values()))).format,)

    @property
    def _what(self) -> str:
        """What is written, for sentences."""
        return f"--to {self.to}" if self.mix is None else "the recipe"

    def _check_rules(self) -> None:
        """KconvertError for rules of INT4 where nothing becomes that."""
        asked = {"group-size": (self.group_size, 32), "convention": (self.convention, KIMI.name)}
        for option, (value, usual) in asked.items():
            if value != usual and not any(isinstance(format, Packed) for format in self._written):
                raise KconvertError(f"--{option} {value} is for INT4, of which {self._what} writes none; leave it out")

    def _check_target(self) -> None:
        if self.mix is not None and self.to != MIXED:
            raise KconvertError(f"a recipe in a file goes with the target {MIXED!r}, not with {self.to}")
        if self.mix is None and self.to not in TARGETS:
            raise KconvertError(f"there is no target {self.to!r}; there are {', '.join(TARGETS)}")
        known = layouts_of(self.to)
        if self.layout and self.layout not in known:
            raise KconvertError(f"{self.to} has no layout {self.layout!r}; it has {', '.join(known) or 'none'}")
        if self.attention not in ATTENTIONS or (self.attention != ATTENTIONS[0] and self.to != "nvfp4"):
            raise KconvertError(
                f"attention as {self.attention!r} is not possible for {self.to}; for nvfp4 it is {' or '.join(ATTENTIONS)}"
            )

    def _check_scales(self) -> None:
        if self.scales not in (*SCALES, POWERS, WIDE):
            raise KconvertError(
                f"there are no scales by {self.scales!r}; there are {', '.join((*SCALES, POWERS, WIDE))}"
            )
        if self.scales == "mse" and self.require_exact:
            raise KconvertError("exact values have their own scales; leave out either --scales mse or --require-exact")
        if self.scales == "mse" and all(format.scaled(mse=True) is None for format in self._written):
            raise KconvertError(f"scales by mse are not for {self._what}, but for int4, fp8, mxfp4, mxfp8 and nvfp4")
        if self.mix is not None:
            if self.scales in (POWERS, WIDE):
                own = "fp8" if self.scales == POWERS else "mlx"
                raise KconvertError(f"--scales {self.scales} is for --to {own}, not for a recipe")
            return
        (format,) = self._written
        if self.scales == WIDE and not isinstance(format, Affine):
            raise KconvertError(
                f"--scales {WIDE} is for mlx, not for {self.to}, whose scales have a dtype of their own"
            )
        if self.scales == POWERS and format.with_powers() is None:
            what = f"{self.to} {self.layout}".strip()
            raise KconvertError(
                f"--scales ue8m0 is for FP8 in blocks, whose scales engines take as powers of two, not for {what}"
            )

    def settled(self, manifest: Manifest) -> Recipe:
        """This recipe with its layout by name, so that naming the first one makes the same plan.

        KconvertError where a model with this manifest has no such layout.
        """
        if self.mix is not None:
            return self
        layouts = targets_for(manifest)[self.to]
        layout = self.layout or next(iter(layouts))
        if layout not in layouts:
            others = f"it has {', '.join(layouts)}" if any(layouts) else "it has none"
            raise KconvertError(
                f"{self.to} has no layout {layout!r} for {manifest.name}, where no engine looks for such names; {others}"
            )
        return replace(self, layout=layout)

    def target(self, manifest: Manifest) -> Target:
        """The kind of output for a model with this manifest, its encoding by the rules that were asked for."""
        mix = self.mix
        if self.attention != ATTENTIONS[0]:
            if targets_for(manifest)[self.to][self.settled(manifest).layout].spares:
                raise KconvertError(
                    f"attention as {self.attention!r} is not possible for {manifest.name}, where what is no expert stays in "
                    "the encoding that it has; leave it out"
                )
            mix = read_mix(f"nvfp4-{self.attention}-attention", self.settled(manifest).layout)
            mix = replace(mix, option=f"--attention {self.attention}")
        if mix is not None:
            return mixed_target(mix, self._by_rule)
        target = targets_for(manifest)[self.to][self.settled(manifest).layout]
        format = self._by_rule(target.format)
        if self.scales == POWERS:
            format = format.with_powers() or format
        return replace(target, format=format)

    def _by_rule(self, format: Format) -> Format:
        """The format by the rules that were asked for."""
        return format.by_rule(CONVENTIONS[self.convention], self.group_size, self.require_exact)
