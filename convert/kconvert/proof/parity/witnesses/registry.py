"""Who is asked about which encoding; a new one has its witness and its line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kconvert.formats import Format
from kconvert.formats.dense import Dense
from kconvert.formats.engines.amx import Amx
from kconvert.formats.engines.ggml import Integers
from kconvert.formats.engines.heads import Heads
from kconvert.formats.engines.kimi import Product
from kconvert.formats.engines.mlx import Affine
from kconvert.formats.engines.turns import Turns
from kconvert.formats.fp8 import Fp8
from kconvert.formats.gptq import Gptq
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.formats.stacks import MxStack
from kconvert.proof.parity.witnesses import ggml
from kconvert.proof.parity.witnesses.amx import AmxWitness
from kconvert.proof.parity.witnesses.base import Witness
from kconvert.proof.parity.witnesses.dense import DenseWitness
from kconvert.proof.parity.witnesses.fp8 import Fp8Witness
from kconvert.proof.parity.witnesses.gptq import GptqWitness
from kconvert.proof.parity.witnesses.int8 import Int8Witness
from kconvert.proof.parity.witnesses.kimi import Exponents, ExponentsWitness, ProductWitness
from kconvert.proof.parity.witnesses.mlx import AffineWitness, HeadsWitness, TurnsWitness
from kconvert.proof.parity.witnesses.mx import MxStackWitness, MxWitness
from kconvert.proof.parity.witnesses.nvfp4 import Nvfp4Witness
from kconvert.proof.parity.witnesses.packed import PackedWitness

WITNESSES: Mapping[type[Format], type[Witness[Any]]] = {
    Affine: AffineWitness,
    Amx: AmxWitness,
    ggml.Blocks: ggml.BlocksWitness,
    ggml.KeysAndValues: ggml.KeysAndValuesWitness,
    ggml.Turns: ggml.TurnsWitness,
    Dense: DenseWitness,
    Exponents: ExponentsWitness,
    Fp8: Fp8Witness,
    Gptq: GptqWitness,
    Heads: HeadsWitness,
    Integers: ggml.IntegersWitness,
    Int8: Int8Witness,
    Mx: MxWitness,
    MxStack: MxStackWitness,
    Nvfp4: Nvfp4Witness,
    Packed: PackedWitness,
    Product: ProductWitness,
    Turns: TurnsWitness,
}


def witness_of(format: Format) -> Witness[Any]:
    """The witness of this format; one who knows nothing where there is none."""
    return WITNESSES.get(type(format), Witness)(format)
