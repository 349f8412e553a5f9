"""The rules that make integer codes from values: which scale a group gets, and which codes.

| convention | scale | codes |
|---|---|---|
| `kimi` | bf16(amax / 7) | -7 to 7, from the f32 quotient value / scale |
| `compressed-tensors` | bf16(amax / 7.5), 2^-7 where that is zero | -8 to 7, from the quotient rounded to bf16 |

Codes are rounded half to even and then clamped. Kimi's rule is that of moonshotai's releases since Kimi-K2-Thinking,
checked against their weights; the other is compressed-tensors' `calculate_qparams` and `quantize` on a bf16 weight.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Convention:
    """Codes go from `lowest` to `highest`; `rounds`: the quotient is rounded to bf16; `zero_scale` replaces a scale of zero."""

    name: str
    divisor: float
    lowest: int
    highest: int = 7
    rounds: bool = False
    zero_scale: float = 0.0

    @property
    def zero_bits(self) -> int:
        """The bf16 bits of `zero_scale`."""
        return struct.unpack("<I", struct.pack("<f", self.zero_scale))[0] >> 16  # type: ignore[no-any-return]


KIMI = Convention("kimi", 7.0, -7)
COMPRESSED_TENSORS = Convention("compressed-tensors", 7.5, -8, rounds=True, zero_scale=2.0**-7)
# Of amax / divisor for these and the rule's own, `--scales mse` takes the scale with the least squared error for a group.
DIVISORS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.75, 10.5)
# The same for FP8: one below the largest code's 448 clips, those from 256 on move the grid by less than a factor of two.
FP8_DIVISORS = (448.0, 480.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0)
# The same for NVFP4: the rule's scale, and those so many steps of e4m3 (an eighth to a sixteenth each) from it. Four below clip
# at six ninths of amax or more; from amax / 4 on the scale only repeats what is finer.
NVFP4_STEPS = (-2, -1, 1, 2, 3, 4, 5)
# Where squared errors are compared, an error counts as this at most, in units of the power of two in amax.
LARGEST_ERROR = 1.9375
CONVENTIONS = {convention.name: convention for convention in (KIMI, COMPRESSED_TENSORS)}
# AMX scales by least squared error are the rule's times one of these, powers of two an eighth of an octave apart; see
# formats.engines.amx for the search, which begins at AMX_START (1.0) and goes in these strides.
AMX_STRIDES = (4, 2, 1)
AMX_START = 3
AMX_FACTORS = tuple(2.0 ** ((AMX_START - place) / 8) for place in range(AMX_START + 44))
