"""Peak memory of training and evaluation on a grid, for the build at hand and one before, and for each way of keeping.

    python benchmarks/qat_memory.py [--before REVISION-OR-DIRECTORY] [--keep backward served codes nothing]

Layers of fused experts in BF16, trained by AdamW in steps of one micro-batch and of eight; the first input needs a gradient, as
where layers before are trained, or none, as of the first layer where nothing but experts is; gradient checkpointing; an
evaluation. Each figure is the peak RSS of a process of its own over what it held when the weights were there, with memory that
goes back to the system when it is freed. Target: of the default, no more than the build before, 2% aside for pages and threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from common import machine, run, spread, table, verdict

MOST = 1.02
FREES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
# (micro-batches a step, whether the first input needs a gradient, gradient checkpointing); 0 micro-batches: evaluation
CASES = {
    "1 micro-batch": (1, True, False),
    "1 micro-batch, input without gradient": (1, False, False),
    "8 micro-batches": (8, True, False),
    "8 micro-batches, input without gradient": (8, False, False),
    "8 micro-batches, gradient checkpointing": (8, True, True),
    "evaluation": (0, False, False),
}

CHILD = """
import json, mmap, resource, sys
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from kconvert_qat import QATConfig, prepare

(batches, needs_gradient, checkpoints), layers, experts, hidden, options = json.loads(sys.argv[1])

class Experts(nn.Module):
    is_transposed, is_concatenated, has_gate, has_bias = False, True, True, False

    def __init__(self, experts=experts, hidden=hidden):
        super().__init__()
        shapes = {"gate_up_proj": (experts, hidden, hidden), "down_proj": (experts, hidden, hidden // 2)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.bfloat16).mul_(0.02)))

    def forward(self, x):
        gate, up = torch.bmm(x, self.gate_up_proj.mT).chunk(2, -1)
        return torch.bmm(nn.functional.silu(gate) * up, self.down_proj.mT)

def forward(model, x):
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False) if checkpoints else layer(x)
    return x

def x_of(model):
    count, _, width = model[0].gate_up_proj.shape
    return torch.randn(count, 8, width, dtype=torch.bfloat16).requires_grad_(needs_gradient)

def work(model):
    if not batches:
        with torch.no_grad():
            for _ in range(2):
                forward(model, x_of(model))
        return
    optimiser = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        for _ in range(batches):
            forward(model, x_of(model)).sum().backward()
        optimiser.step()
        optimiser.zero_grad()

def made(count, *sizes):
    model = nn.Sequential(*(Experts(*sizes) for _ in range(count)))
    prepare(model, QATConfig(**options))
    return model

work(made(2, 2, 256))  # what is compiled and loaded once
model = made(layers)
before = int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE
work(model)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    sum(parameter.nbytes for parameter in model.parameters())]))
"""


@contextmanager
def build(given: str) -> Iterator[str]:
    """The PYTHONPATH of a directory that has the packages, or of a revision of this repository."""
    if Path(given).is_dir():
        yield os.pathsep.join(str(Path(given, name).resolve()) for name in ("convert", "qat"))
        return
    with tempfile.TemporaryDirectory(prefix="kconvert-before-") as folder:
        here = Path(__file__).parents[1]
        archive = subprocess.run(
            ["git", "-C", here, "archive", given, "convert", "qat"], capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        with build(folder) as path:
            yield path


def peak(path: str, request: list[object]) -> tuple[int, int]:
    """Bytes beside the weights, and of the weights."""
    environment = [f"PYTHONPATH={path}", *(f"{key}={value}" for key, value in FREES.items())]
    beside, weights = json.loads(run(["env", *environment, sys.executable, "-c", CHILD, json.dumps(request)]).stdout)
    return beside, weights


def measured(options: argparse.Namespace, sides: dict[str, tuple[str, dict[str, str]]]) -> None:
    rows, verdicts, weights = [], [], 0
    sizes = [options.layers, options.experts, options.hidden]
    for case, what in CASES.items():
        found: dict[str, list[float]] = {}
        for _ in range(options.runs):
            for name, (path, config) in sides.items():
                beside, weights = peak(path, [what, *sizes, config])
                found.setdefault(name, []).append(beside / 1e6)
        rows.append([case, *(spread(values, 0) for values in found.values())])
        print(*rows[-1], sep="  ", flush=True)
        if "before" in found:
            ratio = median(found[options.keep[0]]) / median(found["before"])
            verdicts.append(f"{case}: {options.keep[0]} / before {ratio:.3f} {verdict(ratio, MOST)}")
    table([f"MB beside {weights / 1e6:.0f} MB of weights", *sides], rows)
    print(*verdicts, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="the build to compare with [default: none]")
    parser.add_argument("--keep", nargs="+", default=["backward", "served", "codes", "nothing"], help="[all]")
    parser.add_argument("--runs", type=int, default=1, help="of each kind [1]")
    parser.add_argument("--layers", type=int, default=8, help="of which one is a small part, as it is in a model [8]")
    parser.add_argument("--experts", type=int, default=8, help="[8]")
    parser.add_argument("--hidden", type=int, default=1024, help="[1024]")
    options = parser.parse_args()
    here = os.environ.get("PYTHONPATH", "")
    sides: dict[str, tuple[str, dict[str, str]]] = {keep: (here, {"keep": keep}) for keep in options.keep}
    if options.before:
        with build(options.before) as path:
            measured(options, {"before": (path, {}), **sides})
    else:
        measured(options, sides)
    machine()


if __name__ == "__main__":
    main()
