"""What the user asked for: the target encoding and what decides the output's bytes. Nothing about how it is run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kconvert.errors import KconvertError
from kconvert.formats.conventions import CONVENTIONS, KIMI
from kconvert.targets.base import DEFAULT_SHARD_SIZE, SCALES, Target
from kconvert.targets.registry import TARGETS


@dataclass(frozen=True, slots=True)
class Recipe:
    """`to` is one of registry.TARGETS and `layout` one of its layouts, "" for the first.

    `source`, when given, is what the quantised weights must be (`int4`), or `bf16` for none; else any will do.
    `shard_size` is the most bytes of tensors in an output file, unless one weight has more; `include` and `exclude` are globs
    of names of weights and tensors.
    `convention`, `group_size` (columns to a scale, a multiple of 8) and `require_exact` are for the target `int4`, `scales`,
    one of base.SCALES, also for `fp8`, `mxfp4` and `mxfp8`; see formats.packed, formats.fp8 and formats.mx.
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

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise KconvertError(f"there is no target {self.to!r}; there are {', '.join(TARGETS)}")
        layouts = TARGETS[self.to]
        # The default goes by its name, so that naming it makes the same plan.
        object.__setattr__(self, "layout", self.layout or next(iter(layouts)))
        if self.layout not in layouts:
            known = ", ".join(name for name in layouts if name) or "none"
            raise KconvertError(f"{self.to} has no layout {self.layout!r}; it has {known}")
        if self.shard_size <= 0:
            raise KconvertError(f"a shard size of {self.shard_size} bytes is not possible; the default is 5GB")
        if self.convention not in CONVENTIONS:
            raise KconvertError(f"there is no convention {self.convention!r}; there are {', '.join(CONVENTIONS)}")
        if self.group_size <= 0 or self.group_size % 8:
            raise KconvertError(f"a group size of {self.group_size} is not possible; it is a multiple of 8, mostly 32")
        self._check_scales()

    def _check_scales(self) -> None:
        if self.scales not in SCALES:
            raise KconvertError(f"there are no scales by {self.scales!r}; there are {', '.join(SCALES)}")
        if self.scales == "mse" and TARGETS[self.to][self.layout].format.scaled(mse=True) is None:
            raise KconvertError(f"scales by mse are not for {self.to}, but for int4, fp8, mxfp4 and mxfp8")
        if self.scales == "mse" and self.require_exact:
            raise KconvertError("exact values have their own scales; leave out either --scales mse or --require-exact")

    @property
    def target(self) -> Target:
        """The kind of output, its encoding by the convention that was asked for."""
        target = TARGETS[self.to][self.layout]
        convention = CONVENTIONS[self.convention]
        return replace(target, format=target.format.by_rule(convention, self.group_size, self.require_exact))
