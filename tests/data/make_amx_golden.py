"""Makes amx_golden.safetensors: what kt-kernel packs of weights that anyone can make again from a seed.

    python tests/data/make_amx_golden.py

runs where `amx_oracle.missing` has nothing to say. Small cases are kept byte for byte, the others as SHA-256.
`weights` needs numpy alone, so tests make the same weights anywhere and compare what the product packs of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

GOLDEN = Path(__file__).with_name("amx_golden.safetensors")
EXPERTS = 2
LARGEST = 0x7F7F  # of the finite BF16 patterns
SIGN = 0x8000


@dataclass(frozen=True)
class Case:
    """One layer of experts to pack. `rows` says which values: see `matrix`."""

    name: str
    method: str
    numa: int
    hidden: int
    intermediate: int
    rows: str = "ordinary"
    kept: bool = False

    @property
    def seed(self) -> int:
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "little")


def cases() -> list[Case]:
    """Both methods; one, two and four NUMA nodes; columns past the first 3584; rows of every awkward kind."""
    found = []
    for method in ("AMXINT4", "AMXINT8"):
        found += [
            Case(f"{method}-awkward", method, 1, 256, 128, rows="awkward", kept=True),
            Case(f"{method}-numa2", method, 2, 256, 512),
            Case(f"{method}-numa4", method, 4, 256, 512, rows="awkward"),
            Case(f"{method}-long-hidden", method, 1, 2 * 3584 + 128, 128),
            Case(f"{method}-long-intermediate", method, 2, 128, 2 * (3584 + 128), rows="awkward"),
        ]
    return found


def weights(case: Case) -> dict[str, np.ndarray]:
    """The case's experts as BF16 bit patterns: gate and up [experts, I, H], down [experts, H, I]."""
    random = np.random.RandomState(case.seed)  # its streams are frozen, a Generator's are not
    wide, tall = (case.intermediate, case.hidden), (case.hidden, case.intermediate)
    return {
        projection: np.stack([matrix(random, *shape, case.rows) for _ in range(EXPERTS)])
        for projection, shape in (("gate", wide), ("up", wide), ("down", tall))
    }


def matrix(random: np.random.RandomState, rows: int, cols: int, kind: str) -> np.ndarray:
    """BF16 bit patterns [rows, cols]: "ordinary" values of a triangular distribution, or "awkward" ones.

    Awkward are: magnitudes spread over 16 binades below a row's own largest; and in the first rows zeros, negative
    zeros, subnormals, ties, values near the largest float, and scales near the smallest normal number.
    """
    sum_of_two = random.randint(-4096, 4097, (rows, cols)) + random.randint(-4096, 4097, (rows, cols))
    if kind == "ordinary":
        return bf16(sum_of_two / 2**17)
    exponents = random.randint(60, 180, (rows, 1)) - random.randint(0, 16, (rows, cols))
    bits = exponents * 128 + random.randint(0, 128, (rows, cols)) + SIGN * random.randint(0, 2, (rows, cols))
    result = bits.astype(np.uint16)
    special = awkward_rows(random, cols)
    result[: len(special)] = special[:rows]
    return result


def awkward_rows(random: np.random.RandomState, cols: int) -> np.ndarray:
    signs = SIGN * random.randint(0, 2, cols)
    halves = random.randint(-253, 254, cols) / 2
    tiny = 2.0**-126  # the smallest normal number
    subnormals = random.randint(0, 128, cols) + signs
    near_tiny = random.randint(0, 256, cols) + signs  # up to twice the smallest normal number
    return np.stack(
        [
            np.zeros(cols, np.uint16),
            np.full(cols, SIGN, np.uint16),
            led_by(0, signs),
            subnormals.astype(np.uint16),
            led_by(1.5 * tiny, near_tiny),
            led_by(111 * tiny, near_tiny),
            led_by(112 * tiny, near_tiny),
            led_by(113 * tiny, near_tiny),
            led_by(126 * tiny, near_tiny),
            led_by(127 * tiny, near_tiny),
            led_by(128 * tiny, near_tiny),
            led_by(112, bf16(np.clip(halves, -112, 112))),
            led_by(-112, bf16(np.clip(halves * 2, -112, 112))),
            led_by(127, bf16(halves)),
            led_by(-127 * 2.0**-40, bf16(halves * 2.0**-40)),
            led_by(-112 * 2.0**30, bf16(np.clip(halves, -112, 112) * 2.0**30)),
            (LARGEST - random.randint(0, 2048, cols) + signs).astype(np.uint16),
            led_by(1, np.zeros(cols)),
        ]
    )


def led_by(first: float, others: np.ndarray) -> np.ndarray:
    """A row of bit patterns whose value in column 5 is `first`."""
    row = others.astype(np.uint16)
    row[5] = bf16(np.array(first))
    return row


def bf16(values: np.ndarray) -> np.ndarray:
    """F32 values -> their BF16 bit patterns, rounded to nearest even."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def tensors(case: Case) -> dict[str, torch.Tensor]:
    """The case's weights as BF16 tensors, as kt-kernel takes them."""
    return {name: torch.from_numpy(bits).view(torch.bfloat16) for name, bits in weights(case).items()}


def digest(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


def make() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    import amx_oracle

    if reason := amx_oracle.missing():
        sys.exit(reason)
    kept, records = {}, []
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            packed = amx_oracle.pack(Path(folder), case.method, case.numa, **tensors(case))
        records.append(
            asdict(case)
            | {"weights": {name: digest(bits) for name, bits in weights(case).items()}}
            | {"packed": {name: digest(data) for name, data in packed.items()}}
        )
        if case.kept:
            kept |= {f"{case.name}/{name}": data for name, data in packed.items()}
        print(case.name, file=sys.stderr)
    version = importlib.metadata.version("kt-kernel")
    save_file(kept, GOLDEN, {"made_by": f"kt-kernel {version}", "cases": json.dumps(records)})


if __name__ == "__main__":
    make()
