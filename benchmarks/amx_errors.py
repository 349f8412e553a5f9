"""What AMX scales lose: relative Frobenius error and SQNR of scales by amax and by mse, on weights of several distributions.

The weights are what Kimi's INT4 in groups of 32 makes of the distribution, or its BF16 values themselves. Seeded; a minute.
"""

from __future__ import annotations

import argparse
import math

import torch
from common import table
from torch.distributions import Laplace, Normal, StudentT

from kconvert.formats.conventions import KIMI
from kconvert.formats.reference import amx, packed

ROWS = 256
DISTRIBUTIONS = {"Gaussian": Normal(0.0, 0.02), "Laplace": Laplace(0.0, 0.02), "Student t(5)": StudentT(5.0, 0.0, 0.02)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[2048, 7168], help="[2048 7168]")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, distribution in DISTRIBUTIONS.items():
        for cols in options.columns:
            values = distribution.sample((ROWS, cols)).bfloat16()
            sources = {"BF16": values, "INT4": packed.decode(*packed.encode(values, 32, KIMI), cols)}
            for source, weight in sources.items():
                cells = [cell(weight, bits, mse) for bits in (4, 8) for mse in (False, True)]
                rows.append([f"{name}, {cols} columns, from {source}", *cells])
    table(["", "AMXINT4 amax", "AMXINT4 mse", "AMXINT8 amax", "AMXINT8 mse"], rows)


def cell(weight: torch.Tensor, bits: int, mse: bool) -> str:
    served = amx.decode(*amx.encode(weight, bits, mse), weight.shape[1], bits)
    relative = float((weight.double() - served.double()).norm() / weight.double().norm())
    return f"{relative:.4f} ({-20 * math.log10(relative):.1f} dB)"


if __name__ == "__main__":
    main()
