"""What fake quantisation adds to a step of training, for the build at hand, one before, and torchao, in turns.

    python benchmarks/qat_once_a_step.py [--before PYTHONPATH] [--torchao PYTHONPATH] [--device cuda] [--grid int4]

Fused experts in BF16 with 512 tokens for each, forward and backward of inputs and weights, in a training with 8 micro-batches a
step and in one with 1; after each step every weight changes. Measured is how long a prepared module waits for its weights, over
the rest of the same step, so that what else runs on the machine slows both. The builds take turns, each in a process of its
own. Targets: at most 5% with 8 micro-batches, 20% with 1 on the CPU, the kernel forward and backward at most 1.3 times a
copy (1.2 on CUDA), and no more peak memory in two steps of AdamW on four layers of half the width, 8 micro-batches each, than
before.

torchao's side is its IntxFakeQuantizer in the forward of the same experts: INT4 in groups of 32, symmetric, which is the grid
of the convention `compressed-tensors` but for scales in F32 (1% of the values differ). What its backward takes, which masks
the gradient, counts as the rest of the step. `pip install --no-deps --target PATH torchao` makes a PYTHONPATH for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from statistics import median

from common import machine, spread, table, verdict

JOBS = {"8 micro-batches": 8, "1 micro-batch": 1, "kernel / copy": 0}
MEMORY = -1  # a job
MOST_MEMORY = 1.02  # times that of the build before: pages and threads are not the same each time
LIMITS = {"8 micro-batches": 0.05, "1 micro-batch": 0.20, "kernel / copy": 1.3}
ON_CUDA = {**LIMITS, "kernel / copy": 1.2}

CHILD = """
import json, mmap, resource, sys, time, types
import torch
from torch import nn
import kconvert_qat
from kconvert_qat import QATConfig, attach, prepare
from kconvert_qat.grid import fake_quantise

device, experts, hidden, width, tokens, options, torchao = json.loads(sys.argv[1])
config = QATConfig(**options)
if torchao:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
    quantiser = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=32))

class Experts(nn.Module):
    is_transposed, is_concatenated, has_gate, has_bias = False, True, True, False

    def __init__(self, experts=experts, hidden=hidden, width=width):
        super().__init__()
        shapes = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
        for name, shape in shapes.items():
            weight = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
            setattr(self, name, nn.Parameter(weight))

    def forward(self, x):
        gate, up = torch.bmm(x, self.gate_up_proj.mT).chunk(2, -1)
        return torch.bmm(nn.functional.silu(gate) * up, self.down_proj.mT)

class ByTorchao(Experts):
    def forward(self, x):
        names = ("gate_up_proj", "down_proj")
        weights = {name: timed(lambda: by_torchao(getattr(self, name))) for name in names}
        return Experts.forward(types.SimpleNamespace(**weights), x)

def by_torchao(weight):
    return quantiser(weight.flatten(0, 1)).view(weight.shape)

def wait():
    if device != "cpu":
        torch.cuda.synchronize()

def step(model, batches):
    for _ in range(batches):
        model["experts"](x.detach().requires_grad_()).sum().backward()  # as of layers before
    wait()

def seconds(work):
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started

waited = [0.0]
real = attach.Attached.serve

def timed(work):
    found = []
    waited[0] += seconds(lambda: found.append(work()))
    return found[0]

attach.Attached.serve = lambda self, *args: timed(lambda: real(self, *args))

def made():
    model = nn.ModuleDict({"experts": ByTorchao() if torchao else Experts()})
    if not torchao:
        prepare(model, config)
    return model

def share(batches):
    waited[0] = 0.0
    if batches not in trained:
        trained[batches] = made()
    whole = seconds(lambda: step(trained[batches], batches))
    with torch.no_grad():
        for parameter in trained[batches].parameters():
            parameter.neg_()  # all of it, which BF16 would round away of a small update
            parameter.grad = None
    return waited[0] / (whole - waited[0])

def kernel():
    leaf = made()["experts"].gate_up_proj.detach().clone().requires_grad_()
    gradient = torch.ones_like(leaf)
    more = (options["grid"],) if "grid" in options else ()
    def both_ways():
        if torchao:
            served = by_torchao(leaf)
        else:
            served = fake_quantise(leaf, config.group_size, config.convention, False, *more)
        torch.autograd.grad(served, leaf, gradient)

    pairs = [seconds(both_ways) / seconds(lambda: leaf.detach().clone()) for _ in range(5)]
    return sorted(pairs)[2]

def peak():
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def held():  # now; the peak may have been higher before
    if device != "cpu":
        return torch.cuda.memory_allocated()
    return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE

def memory():
    tiny = nn.ModuleDict({"experts": Experts(1, 256, 256)})  # for what is compiled and loaded once
    prepare(tiny, config)
    tiny["experts"](x[:1, :1, :256]).sum().backward()
    torch.optim.AdamW(tiny.parameters()).step()  # imports 80 MB, where the grid has not yet
    kind = ByTorchao if torchao else Experts  # of a quarter, so that a layer is a small part, as it is in a model
    layers = nn.Sequential(*(kind(experts, hidden // 2, width // 2) for _ in range(4)))
    if not torchao:
        prepare(layers, config)
    before = held()
    optimiser = torch.optim.AdamW(layers.parameters())
    for _ in range(2):
        for _ in range(8):
            layers(x[..., : hidden // 2].detach().requires_grad_()).sum().backward()  # as of layers before
        wait()
        optimiser.step()
        optimiser.zero_grad()
    return (peak() - before) / 1e6

torch.manual_seed(0)
x = torch.randn(experts, tokens, hidden, dtype=torch.bfloat16, device=device)
trained = {}
print(json.dumps(kconvert_qat.__file__), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps(memory() if job < 0 else share(job) if job else kernel()), flush=True)
"""


# What is freed goes back to the system, so that the process's peak is that of its tensors; which takes time.
FREES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
NOTHING: Mapping[str, str] = {}


class Build:
    """A process that has one of the builds."""

    def __init__(self, path: str, request: list[object], more: Mapping[str, str] = NOTHING) -> None:
        environment = {**os.environ, "PYTHONPATH": path, **more}
        command = [sys.executable, "-c", CHILD, json.dumps(request)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.place = self._answer()

    def ask(self, job: int) -> float:
        """What the grid adds to a step of `job` micro-batches, a part of it; 0: the kernel to a copy; MEMORY: in MB, the peak
        of two steps over what there was before."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{job}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        return str(answer)

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="PYTHONPATH", help="of the build before [default: the one at hand alone]")
    parser.add_argument("--torchao", metavar="PYTHONPATH", help="where torchao lies [default: not measured]")
    parser.add_argument("--runs", type=int, default=7, help="of each kind [7]")
    parser.add_argument("--experts", type=int, default=2, help="[2]")
    parser.add_argument("--hidden", type=int, default=2048, help="[2048]")
    parser.add_argument("--width", type=int, default=1024, help="of an expert [1024]")
    parser.add_argument("--tokens", type=int, default=512, help="of an expert [512]")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--grid", help="of the build at hand [int4]")
    parser.add_argument("--keep", help="likewise [backward]")
    options = parser.parse_args()
    sizes = [options.device, options.experts, options.hidden, options.width, options.tokens]
    own = {key: value for key in ("grid", "keep") if (value := getattr(options, key))}
    here = os.environ.get("PYTHONPATH", "")
    sides: dict[str, tuple[str, list[object]]] = {"now": (here, [*sizes, own, False])}
    if options.before:
        sides = {"before": (options.before, [*sizes, {}, False]), **sides}
    if options.torchao:
        sides["torchao"] = os.pathsep.join(filter(None, (here, options.torchao))), [*sizes, {}, True]
    memory = {}
    for name, side in sides.items():
        alone = Build(*side, FREES)
        memory[name] = alone.ask(MEMORY)
        alone.close()
    builds = {name: Build(*side) for name, side in sides.items()}
    found: dict[tuple[str, str], list[float]] = {}
    for run in range(options.runs + 1):
        for job, number in JOBS.items():
            for name, build in builds.items():
                measured = build.ask(number)
                if run:  # the first is for what is compiled and allocated once
                    found.setdefault((job, name), []).append(measured)
    for build in builds.values():
        build.close()
    rows = [[job, *(spread(found[job, name], 3) for name in builds)] for job in JOBS]
    table(["", *builds], [*rows, ["peak memory, MB", *(f"{memory[name]:.0f}" for name in builds)]])
    for job, limit in (LIMITS if options.device == "cpu" else ON_CUDA).items():
        value = median(found[job, "now"])
        print(f"{job}: {value:.3f} {verdict(value, limit)}")
    if "before" in memory:
        more = memory["now"] / memory["before"]
        print(f"peak memory / before: {more:.3f} {verdict(more, MOST_MEMORY)}")
    machine()


if __name__ == "__main__":
    main()
