"""What a kind of output is: an encoding, the weights that get it, what config.json says of it; and what every plan tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kconvert.errors import KconvertError, counted
from kconvert.formats import Format
from kconvert.formats.fp8 import Fp8
from kconvert.planning.containers import Container, Safetensors, json_bytes
from kconvert.planning.steps import Step, count_steps
from kconvert.version import __version__

if TYPE_CHECKING:
    from kconvert.models.model import Model, Weight

DEFAULT_SHARD_SIZE = 5_000_000_000
SCALES = ("amax", "mse")
RESTS = ("bf16", "q8_0")  # the first is the default
ATTENTIONS = ("bf16", "fp8")  # likewise
MIXED = "recipe"  # in the place of a target: the recipe is in a file
POWERS = "ue8m0"  # powers of two, for FP8
WIDE = "f32"  # the source's in F32, for MLX
# First words of the roles that are quantised as "every Linear"; not lm_head, nor the projections of linear attention, some of
# which are narrower than a block. A weight that no manifest lists is `linear` where it is one that the source has quantised and
# names tell no more, and `other` in a model whose names tell nothing at all.
LINEARS = frozenset({"expert", "shared", "dense", "attention", "linear", "other"})
EXPERTS = frozenset({"expert", "other"})
# Roles of what engines hold in the encoding of the release, whatever config.json says: DeepSeek's own code and vLLM have no
# other code for Engram's tables. They are taken for an output only where a recipe names them.
HELD = frozenset({"engram.embedding"})
# Last words of the roles of matrices that no engine takes for a Linear of its quantisation config …
NO_LINEARS = frozenset({"embedding", "router"})
# … except the router gate in the engines' code for these model types.
LINEAR_ROUTERS = frozenset({"qwen2_moe", "qwen3_moe"})

# (format, Linears that the output has quantised, those that it has not) -> quantization_config
Table: TypeAlias = Callable[[Any, list[str], list[str]], dict[str, Any]]
# quantization_config -> what else declares it, by the files' names
Beside: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]]
# What a config.json says of some Linears, and their names
Declared: TypeAlias = tuple[Mapping[str, Any], Sequence[str]]
# What a weight is called in the output
Names: TypeAlias = Callable[["Weight"], str]


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of output: an encoding, the weights that get it, what config.json says of it, and the files it lies in.

    `roles` are the first words of the roles that are taken, except for the whole roles in `keeps`; None: every weight that
    the source has quantised. `table` writes the quantization_config; None when there is nothing to declare. `container` makes
    the files from the largest size that a shard may have.

    `names` are those of the weights that are taken, where they are to have others; `experts` is what the key `expert_dtype`
    says, if it is to be there; `spares`: what is not taken stays in the encoding that it has. `beside` makes files that repeat
    the quantization_config for engines that look there.
    """

    format: Format
    roles: frozenset[str] | None = None
    keeps: frozenset[str] = frozenset()
    table: Table | None = None
    container: Callable[[int], Container] = Safetensors
    names: Names | None = None
    experts: str | None = None
    spares: bool = False
    beside: Beside | None = None

    def choice(self, weight: Weight) -> Format | None:
        """The encoding that the weight is to have; None: it is not taken."""
        return self.format if self.takes(weight) else None

    def leaves(self, weight: Weight) -> bool:
        """Whether the weight is to stay as it is, with what the source's config.json says of it."""
        return False

    def said(self, model: Model, weights: Sequence[Weight]) -> Sequence[Declared]:
        """What the output's config.json says of weights that stay as they are; KconvertError where it cannot."""
        return ()

    def check(self, model: Model) -> None:
        """KconvertError where what was asked for can mean nothing in this model."""

    def notes(self, model: Model) -> list[str]:
        """What of it has no effect there."""
        return []

    @property
    def words(self) -> str:
        """The rules by which weights are taken, where these are more than a name."""
        return ""

    @property
    def records(self) -> Mapping[str, bytes]:
        """Files that say what was asked for, where config.json cannot."""
        return {}

    def origin(self, model: Model) -> Mapping[str, bytes]:
        """The file that says what the output is made from, where weights get another model's names: engines want that beside
        it."""
        names = self.names
        taken = (weight for weight in model.weights if names is not None and self.choice(weight) is not None)
        if names is None or all(names(weight) == weight.name for weight in taken):
            return {}
        from kconvert.models.amx import RECORD

        return {RECORD: json_bytes(origin_of(model.checkpoint.name))}

    def declare(
        self,
        format: Format,
        quantised: Mapping[Format, Sequence[str]],
        others: Sequence[str],
        left: Sequence[Declared] = (),
    ) -> dict[str, Any]:
        """quantization_config: `quantised` are Linears by encoding, of which the usual one is `format`; `left` those that stay
        as they are, with what is said of them."""
        assert self.table is not None
        return self.table(format, [name for names in quantised.values() for name in names], list(others))

    def takes(self, weight: Weight) -> bool:
        if self.roles is None:
            return weight.format.quantised and weight.role not in HELD
        return weight.role.partition(".")[0] in self.roles and weight.role not in self.keeps


class Change(NamedTuple):
    """What becomes of the weights of one kind: they get `encoding`, which may be another than `source`, the one that they have;
    `keeps_codes`: their codes and scales are copied, be it under other names."""

    source: Format
    encoding: Format
    is_other: bool
    keeps_codes: bool

    @classmethod
    def of(cls, source: Format, encoding: Format) -> Change:
        is_other = encoding != source
        return cls(source, encoding, is_other, not is_other or (encoding.quantised and encoding.usual == source.usual))


# What follows --to -> layout ("" where there is one only) -> what it means; the first layout is the default.
Targets: TypeAlias = Mapping[str, Mapping[str, Target]]


def origin_of(source: str) -> dict[str, str]:
    """What a record says of the checkpoint of this name, a directory's or `org/name@revision`."""
    name, _, revision = source.partition("@") if "/" in source else (source, "", "")
    return {"kconvert": __version__, "source": name, "revision": revision}


def is_linear_role(role: str, model_type: object) -> bool:
    """Whether an engine's code for this type of model has a Linear in this role."""
    last = role.rpartition(".")[2]
    return last not in NO_LINEARS or (last == "router" and model_type in LINEAR_ROUTERS)


def facts_of(
    model: Model,
    to: str,
    asked: Mapping[str, Any],
    steps: Sequence[Step],
    read_bytes: int,
    told: Mapping[str, Any],
    dropped: Iterable[str],
    notes: Sequence[str] | None,
) -> dict[str, Any]:
    """What a user wants to know of a plan; `asked`: what for, beside the target, `told`: of its steps, beside their counts."""
    from kconvert.models.model import format_counts  # a command starts with this module, and without that one

    return {
        "source": model.checkpoint.name,
        "manifest": model.manifest.name,
        "to": to,
        **asked,
        "parameters": model.parameters,
        "weights": dict(format_counts(model.weights)),
        "read_bytes": read_bytes,
        **count_steps(steps),
        **told,
        "dropped": list(dropped),
        **({} if notes is None else {"notes": list(notes)}),
        **({"findings": list(model.findings)} if model.findings and "findings" not in told else {}),
        "left_out": list(model.checkpoint.left_out),
    }


def is_ragged(format: Format, rows: int, cols: int) -> bool:
    """Whether a matrix has blocks of FP8 that are cut off at an edge."""
    return isinstance(format, Fp8) and format.is_ragged(rows, cols)


def ragged_blocks(model: Model, encoding: Callable[[Weight], Format], offer: bool) -> dict[str, Any]:
    """The model's findings, and that weights get such blocks, of which there are some; `offer` scales by channel instead."""
    cut = [weight for weight in model.weights if is_ragged(encoding(weight), weight.rows, weight.cols)]
    first = cut[0]
    experts = any(weight.role.partition(".")[0] == "expert" for weight in cut)
    finding = (
        f"{first.name!r} [{first.rows}, {first.cols}] ends within a block of FP8 ({counted(len(cut), 'weight')} so); "
        f"transformers 5.23 reads such wrongly, silently{', and vLLM and SGLang refuse experts so' * experts}"
        f"{'; --layout compressed-tensors-channel has a scale for each row instead' * offer}"
    )
    return {"findings": [*model.findings, finding]}


def read_bytes(model: Model) -> int:
    """The size of all of the model's tensors that have values."""
    weights = sum(tensor.nbytes for weight in model.weights for tensor in weight.tensors)
    return weights + sum(plain.tensor.nbytes for plain in model.plain)


def refuse_loss(weight: str, source: Format, encoding: Format, option: str = "") -> None:
    """KconvertError where the weight, spelt as `source` now, may lose values in this encoding, which it gets by an `option`."""
    if encoding.fate(source) == "lossy":
        either = f"{option} or " * bool(option)
        raise KconvertError(
            f"weight {weight!r} ({source.label}) may lose values as {encoding.label}, which --require-exact forbids; leave out "
            f"{either}--require-exact"
        )
