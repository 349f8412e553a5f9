"""What a witness says of an encoding, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats import Format
from kconvert.models.model import Weight
from kconvert.proof.parity import library
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

State: TypeAlias = "dict[str, torch.Tensor]"
Encoder: TypeAlias = Callable[..., tuple[Any, ...]]  # values -> codes, scales and what else there is
F = TypeVar("F", bound=Format)

PIECE_ELEMENTS = 1 << 17  # of the work of a reference
COUNT_BYTES = Loop("figures", "count_bytes", "u1* i8* i8")
COUNTERS = 4  # of each byte: to add to one number again and again takes as long as to add to four


@dataclass(frozen=True)
class Witness(Generic[F]):
    """What is known of `format` by ways that are not its kernels. Of an encoding that nobody else reads: nothing.

    `state` are the tensors of some rows of a weight by suffix, as torch reads them, but for constants.
    """

    format: F

    by_library = True  # whether compressed-tensors decodes it
    has_many_spellings = False  # whether codes that give back every value are right, whichever they are
    loses_signs = False  # whether zeros are positive, whatever they were
    decodes_parts_of_blocks = False  # whether rows can be decoded without the others that share their scales

    @property
    def shared(self) -> str | None:
        """The part that weights which engines fuse have in common, if there is one."""
        return None

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """The values [rows, cols] = `shape`, in the weight's own dtype."""
        raise NotImplementedError(f"no independent decoder of {self.format.label}")

    @property
    def keeps_products(self) -> bool:
        """Whether its values are products of codes and scales that nothing rounds, as far as they are a source's."""
        return False

    def products(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """The values before they are rounded to the weight's own dtype, f32."""
        return self.values(state, shape).float()

    def claims(self, source: Format) -> bool:
        """Whether every value of a weight that is spelt as `source` belongs into this encoding, though it has codes."""
        return False

    def arguments(self) -> dict[str, Any]:
        """compressed-tensors' QuantizationArgs of the format."""
        raise NotImplementedError(f"compressed-tensors does not know {self.format.label}")

    @property
    def has_reference(self) -> bool:
        """Whether it is known what kconvert writes as this format: then `encodings` are."""
        return False

    def encodings(self, values: torch.Tensor, weight: Weight, first: int, found: State) -> Iterator[State]:
        """What the format may make of `values`, bf16 [rows, cols], as the rows of `weight` from `first` on, by what was `found`
        where more than the values decides."""
        raise NotImplementedError(f"no reference encoder of {self.format.label}")

    def respelt(self, source: Format, state: State) -> State | None:
        """What the tensors `state` of a weight in `source` become where their codes are kept; None where they are not."""
        return None

    def is_quick(self, cols: int) -> bool:
        """Whether there are `quick_values` of a weight with so many columns."""
        return False

    def quick_values(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        """`values` in less time, in memory of `buffers`."""
        raise NotImplementedError(f"no quick decoder of {self.format.label}")

    def quick_products(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        """`products` in less time, by the table of `quick_values`."""
        return self.quick_values(state, cols, buffers).float()

    @property
    def judges_quickly(self) -> bool:
        """Whether `is_made_of` knows such tensors."""
        return False

    def is_made_of(self, values: torch.Tensor, weight: Weight, first: int, found: State, buffers: Buffers) -> bool:
        """Whether what was `found` is one of `encodings`, in less time. The values are finite, and so far from the largest that
        nothing made of them is infinite; False also where only the reference knows."""
        return False

    def copies(self, found: State, source: Format, state: State) -> bool:
        """Whether what was `found` has the codes and the steps of the tensors `state` in the format `source`, and so the same
        values."""
        return False

    def nearest(self, source: Format, state: State) -> State | None:
        """The tensors `state` of a weight in `source` with the nearest scales that this encoding has in the place of those that
        it has not, as a conversion plans it; None where it has all."""
        return None

    def count_changed(self, source: Format, state: State, shape: tuple[int, int]) -> int:
        """Of how many groups of the tensors `state` in `source`, whose values the encoding is to have, it has others, as a
        conversion plans and counts them."""
        return 0

    def largest_step(self, state: State) -> torch.Tensor | None:
        """Scales of which no value is more than 16 times one; None where only the values tell."""
        return None

    def grid(self) -> tuple[float, ...] | None:
        """The value of each code in the order in which codes count as unsigned numbers; None where there are no codes."""
        return None

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """How often each code of the grid occurs in rows [rows, cols] = `shape`, int64."""
        raise NotImplementedError(f"{self.format.label} has no codes")

    def scales(self, state: State) -> torch.Tensor:
        """f32 or f64, one a group."""
        return state["weight_scale"].float()

    def group_columns(self, cols: int) -> int:
        """How many columns of a row share a scale."""
        return cols


@cache
def scheme(witness: Witness[Any]) -> Any:
    """What compressed-tensors calls the format; it takes a while to check its own words."""
    arguments = library.part("quantization", "QuantizationArgs")(**witness.arguments())
    return library.part("quantization", "QuantizationScheme")(targets=["Linear"], weights=arguments)


def without_unused(format: Any, state: State) -> State:
    """Without zero points that mean nothing: compressed-tensors' own writers leave them out."""
    gone = {part.suffix for part in format.unused}
    return {suffix: tensor for suffix, tensor in state.items() if suffix not in gone}


def in_pieces(
    encode: Encoder,
    values: torch.Tensor,
    block: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that `encode` makes of whole blocks, by default rows, as many at a time as fit into a cache."""
    import torch

    rows, cols = values.shape
    height, width = block or (1, cols)
    across = max(width, PIECE_ELEMENTS // height // width * width)
    down = max(height, PIECE_ELEMENTS // min(across, cols) // height * height)
    bands = [
        [encode(values[row : row + down, col : col + across]) for col in range(0, cols, across)]
        for row in range(0, rows, down)
    ]
    codes, scale = (torch.cat([torch.cat([piece[k] for piece in band], -1) for band in bands]) for k in (0, 1))
    return codes, scale


def count_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [256]: how often each byte occurs."""
    import torch

    counts = torch.zeros(COUNTERS, 256, dtype=torch.int64)
    COUNT_BYTES(tensor.contiguous().view(-1).view(torch.uint8), counts, tensor.nbytes)
    return counts.sum(0)


def nibbles(counts: torch.Tensor) -> torch.Tensor:
    """How often each byte occurs -> how often each nibble does."""
    square = counts.view(16, 16)
    return square.sum(0) + square.sum(1)


def signed(bits: int) -> tuple[float, ...]:
    """Integers as two's complements, in the order of their bits."""
    half = 2 ** (bits - 1)
    return tuple(float(code) for code in (*range(half), *range(-half, 0)))
