"""What the user asked for: the target encoding and what decides the output's bytes. Nothing about how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kconvert.dialects import with_quantization, without_quantization
from kconvert.dialects.compressed_tensors import compressed_fp8_table, int8_table, mx_table, packed_table
from kconvert.dialects.fp8 import fp8_table
from kconvert.errors import KconvertError
from kconvert.formats import Format
from kconvert.formats.conventions import CONVENTIONS, KIMI
from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import Mx
from kconvert.formats.packed import Packed
from kconvert.models.model import Model, Weight, format_counts

HALVES = {"BF16": "bfloat16", "F16": "float16"}  # as config.json spells them
DEFAULT_SHARD_SIZE = 5_000_000_000
SCALES = ("amax", "mse")
# First words of the roles that are quantised as "every Linear"; not lm_head, nor the projections of linear attention, some of
# which are narrower than a block. `other` is the role where no manifest knows the model: a weight is then one that the
# source has quantised.
LINEARS = frozenset({"expert", "shared", "dense", "attention", "other"})
EXPERTS = frozenset({"expert", "other"})
# llm-compressor's recipes leave them: engines fuse the two, and 576 rows of kv_a are no whole number of blocks.
COMPRESSED_KEEPS = frozenset({"attention.q_a", "attention.kv_a"})
# Last words of the roles of matrices that no engine takes for a Linear of its quantisation config …
NO_LINEARS = frozenset({"embedding", "router"})
# … except the router gate in the engines' code for these model types.
LINEAR_ROUTERS = frozenset({"qwen2_moe", "qwen3_moe"})


@dataclass(frozen=True, slots=True)
class Target:
    """An encoding, the weights that get it, and what config.json says of it.

    `roles` are the first words of the roles that are taken, except for the whole roles in `keeps`; None: every weight that
    the source has quantised. `table` makes the quantization_config from the names of the Linears that the output has
    quantised and of those that it has not; None when there is nothing to declare.
    """

    format: Format
    roles: frozenset[str] | None = None
    keeps: frozenset[str] = frozenset()
    table: Callable[[list[str], list[str]], dict[str, Any]] | None = None

    def takes(self, weight: Weight) -> bool:
        if self.roles is None:
            return weight.format.quantised
        return weight.role.partition(".")[0] in self.roles and weight.role not in self.keeps


def _fp8_experts_table(quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    return fp8_table(unquantised)


def _fp8_all_table(quantised: list[str], unquantised: list[str]) -> dict[str, Any]:
    """The published layout lists nothing, and no engine takes lm_head for a Linear: it needs no entry."""
    return fp8_table(name for name in unquantised if name.rpartition(".")[2] != "lm_head")


COMPRESSED_FP8 = {
    strategy: Target(
        # llm-compressor's scales have the model's dtype, and transformers dequantises to the scales'.
        Fp8(strategy, scale_name="weight_scale", scale_dtype="BF16"),
        LINEARS,
        COMPRESSED_KEEPS,
        partial(compressed_fp8_table, strategy),
    )
    for strategy in ("block", "channel")
}


def _experts_or_all(format: Format, table: Callable[[list[str], list[str]], dict[str, Any]]) -> Mapping[str, Target]:
    return {"experts": Target(format, EXPERTS, table=table), "all": Target(format, LINEARS, COMPRESSED_KEEPS, table)}


# Target -> layout -> what it means; the first layout is the default.
TARGETS: Mapping[str, Mapping[str, Target]] = {
    "bf16": {"": Target(Dense("BF16"))},
    "f16": {"": Target(Dense("F16"))},
    "fp8": {
        "experts": Target(Fp8(), EXPERTS, table=_fp8_experts_table),
        "all": Target(Fp8(), LINEARS, table=_fp8_all_table),
        "compressed-tensors": COMPRESSED_FP8["block"],
        "compressed-tensors-channel": COMPRESSED_FP8["channel"],
    },
    "int4": {"": Target(Packed(32), EXPERTS, table=partial(packed_table, 32))},
    "int8": _experts_or_all(Int8(), int8_table),
    "mxfp4": _experts_or_all(Mx(4), partial(mx_table, 4)),
    "mxfp8": _experts_or_all(Mx(8), partial(mx_table, 8)),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """`to` is one of TARGETS and `layout` one of its layouts, "" for the first.

    `source`, when given, is what the quantised weights must be (`int4`), or `bf16` for none; else any will do.
    `shard_size` is the most bytes of tensors in an output file, unless one weight has more; `include` and `exclude` are globs
    of names of weights and tensors.
    `convention`, `group_size` (columns to a scale, a multiple of 8) and `require_exact` are for the target `int4`, `scales`,
    one of SCALES, also for `fp8`, `mxfp4` and `mxfp8`; see formats.packed, formats.fp8 and formats.mx.
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
        if self.scales == "mse" and not TARGETS[self.to][self.layout].format.has_choice_of_scales:
            raise KconvertError(f"scales by mse are not for {self.to}, but for int4, fp8, mxfp4 and mxfp8")
        if self.scales == "mse" and self.require_exact:
            raise KconvertError("exact values have their own scales; leave out either --scales mse or --require-exact")

    def check_source(self, model: Model) -> None:
        """KconvertError when the checkpoint is not what the command's name says."""
        quantised = [weight for weight in model.weights if weight.format.quantised]
        if not quantised and (self.source not in (None, "bf16") or self._target.roles is None):
            raise KconvertError(f"{model.checkpoint.root} holds no quantised weights; there is nothing to convert")
        for weight in quantised:
            if self.source and not weight.format.label.startswith(self.source):
                have = ", ".join(sorted(format_counts(quantised)))
                raise KconvertError(
                    f"{weight.tensors[0]} is {weight.format.label}, not {self.source} (the checkpoint holds {have}); "
                    f"use `kconvert convert --to {self.to}`"
                )
        self._check_effect(model, bool(quantised))

    def _check_effect(self, model: Model, has_quantised: bool) -> None:
        """KconvertError when the output would be the source again."""
        root, target = model.checkpoint.root, self._target
        what = f"{self.to} {self.layout}".strip()
        if target.roles is not None and target.roles != EXPERTS and model.manifest.accepts_any and not has_quantised:
            raise KconvertError(
                f"{root} is a {model.checkpoint.config.get('model_type') or 'model'} without a manifest, so which of its "
                f"matrices are Linears is not known; --to {self.to} --layout experts takes those that are experts by name"
            )
        if not any(target.takes(weight) for weight in model.weights):
            whose = "a routed expert's" if target.roles == EXPERTS else "one of a Linear"
            raise KconvertError(f"{root} has no weight that {what} is for (by their names, none is {whose})")
        if all(self.target(weight) is None for weight in model.weights):
            raise KconvertError(f"{root} has every weight as {what} would write it; there is nothing to convert")

    @property
    def _target(self) -> Target:
        target = TARGETS[self.to][self.layout]
        if not isinstance(target.format, Packed):
            return target
        convention = CONVENTIONS[self.convention]
        format = replace(target.format, group_size=self.group_size, convention=convention, strict=self.require_exact)
        return replace(target, format=format, table=partial(packed_table, self.group_size))

    def encoding(self, weight: Weight) -> Format:
        """What spells this weight in the output."""
        if self._target.takes(weight):
            return self._fit(self._target.format, weight)
        return self._fit(Dense("BF16"), weight) if weight.format.quantised else weight.format

    def _fit(self, format: Format, weight: Weight) -> Format:
        """The format for this weight."""
        try:
            return format.fit(weight.format, weight.rows, weight.cols, mse=self.scales == "mse")
        except ValueError as error:
            raise KconvertError(f"weight {weight.name!r} {error}") from None

    def target(self, weight: Weight) -> Format | None:
        """The encoding that this weight gets; None: its tensors are copied byte for byte."""
        encoding = self.encoding(weight)
        return None if encoding == weight.format else encoding

    def config(self, model: Model) -> dict[str, Any]:
        """config.json of the output."""
        config = self._declare_dtype(model)
        quantised = [weight.name for weight in model.weights if self.encoding(weight).quantised]
        if self._target.table is None or not quantised:
            return config
        unquantised = [weight.name for weight in model.weights if not self.encoding(weight).quantised]
        return with_quantization(config, self._target.table(quantised, [*unquantised, *_plain_linears(model)]))

    def _declare_dtype(self, model: Model) -> dict[str, Any]:
        """config.json without quantisation and, where weights become BF16 or F16, with that dtype: engines cast to it."""
        config = without_quantization(model.checkpoint.config)
        written = self._target.format.dtype if isinstance(self._target.format, Dense) else "BF16"
        others = [dtype for half, dtype in HALVES.items() if half != written]
        tables = [table for table in (config, config.get("text_config")) if isinstance(table, dict)]
        places = [(table, key) for table in tables for key in ("torch_dtype", "dtype") if table.get(key) in others]
        if places and any(isinstance(self.target(weight), Dense) for weight in model.weights):
            for table, key in places:
                table[key] = HALVES[written]
        return config


def _plain_linears(model: Model) -> Iterable[str]:
    """Modules of matrices that are copied as they are, which an engine may take for Linears to be quantised."""
    for plain in model.plain:
        module, _, suffix = plain.tensor.name.rpartition(".")
        is_linear = is_linear_role(plain.role, model.checkpoint.config.get("model_type"))
        if suffix == "weight" and len(plain.tensor.shape) == 2 and is_linear:
            yield module


def is_linear_role(role: str, model_type: object) -> bool:
    """Whether an engine's code for this type of model has a Linear in this role."""
    last = role.rpartition(".")[2]
    return last not in NO_LINEARS or (last == "router" and model_type in LINEAR_ROUTERS)
