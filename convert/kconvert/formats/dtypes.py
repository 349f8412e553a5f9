"""The dtypes that tensors have, as the safetensors format spells them, and their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

# Of GGUF alone: blocks of so many elements in so many bytes; those that are written are in formats.engines.ggml. The shape of
# such a tensor is that of its elements. Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
BLOCKS = {
    **{"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 40)},
    **{"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)},
    **{"Q8_K": (256, 292), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74)},
    **{"IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136)},
    **{"TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18)},
}

# Integers and floats in which zero points lie, and the bit that is set in -0.
ZERO_DTYPES = {
    "I8": 0,
    "U8": 0,
    "I16": 0,
    "I32": 0,
    "I64": 0,
    "F8_E4M3": 0x80,
    "F16": 0x8000,
    "BF16": 0x8000,
    "F32": 1 << 31,
}


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Size in bytes of a tensor of this dtype (a key of DTYPE_BITS or BLOCKS) and shape."""
    elements, nbytes = BLOCKS.get(dtype) or (8, DTYPE_BITS[dtype])
    return math.prod(shape) * nbytes // elements
