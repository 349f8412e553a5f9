"""Fake quantisation of a layer's experts: against a copy, the experts' own matmuls, and torchao's IntxFakeQuantizer.

Weights [experts, 4096, 7168] and [experts, 7168, 2048] in BF16, group 32. Targets: compiled forward and backward at most 1.3 x
a copy of the same bytes (1.2 x on CUDA), and at most 20% of the experts' own matmuls, forward and backward, at 512 tokens an
expert; eager no slower than torchao. Sides take turns. torchao is optional: `pip install --no-deps torchao`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from common import machine, spread, table, verdict

from kconvert_qat.grid import fake_quantise

GROUP = 32
TOKENS = 512


def torchao_side(weights: list[torch.Tensor]) -> Callable[[], object] | None:
    """torchao's eager fake quantiser of the same group size and bits, on two-dimensional views; None without torchao."""
    try:
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
    except ImportError:
        return None
    quantiser = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=GROUP))
    return lambda: [quantiser(weight.flatten(0, 1)) for weight in weights]


def matmuls(weights: list[torch.Tensor]) -> Callable[[], object]:
    """Forward and backward (of inputs and weights) of both projections with TOKENS tokens an expert."""

    def like(weight: torch.Tensor, width: int) -> torch.Tensor:
        return torch.randn(len(weight), TOKENS, width, dtype=weight.dtype, device=weight.device)

    given = [(like(weight, weight.shape[2]), like(weight, weight.shape[1]), weight) for weight in weights]
    return lambda: [(torch.bmm(x, weight.mT), torch.bmm(y, weight), torch.bmm(y.mT, x)) for x, y, weight in given]


def sides_of(weights: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    gradients = [torch.ones_like(weight) for weight in weights]
    compiled = torch.compile(lambda weight: fake_quantise(weight, GROUP, "kimi"))

    def both_ways() -> None:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            torch.autograd.grad(compiled(leaf), leaf, gradient)  # backward() would copy a gradient that we hold

    sides: dict[str, Callable[[], object]] = {
        "copy": lambda: [weight.clone() for weight in weights],
        "eager forward": lambda: [fake_quantise(weight, GROUP, "kimi") for weight in weights],
        "compiled forward": lambda: [compiled(weight) for weight in weights],
        "compiled forward and backward": both_ways,
        "experts' matmuls forward and backward": matmuls(weights),
    }
    torchao = torchao_side(weights)
    return {**sides, "torchao eager forward": torchao} if torchao else sides


def graphed(side: Callable[[], object], replays: int) -> Callable[[], object]:
    """The side's work on the device alone: launching it takes longer than a small kernel, but runs ahead of it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side()

    def replay() -> None:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()

    return replay


def saved_bytes(weight: torch.Tensor) -> int:
    """What autograd keeps for the backward of the fake-quantised weight's matmul, besides the weight and the input."""
    leaf = weight[:1].clone().requires_grad_()
    inputs = torch.randn(1, 8, weight.shape[2], dtype=weight.dtype, device=weight.device, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = torch.bmm(inputs, fake_quantise(leaf, GROUP, "kimi").mT)
    own = {leaf.untyped_storage().data_ptr(), inputs.untyped_storage().data_ptr()}
    assert out.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="of each side [7]")
    parser.add_argument("--experts", type=int, default=8, help="[8]")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda if there is one]"
    )
    options = parser.parse_args()
    shapes = [(options.experts, 4096, 7168), (options.experts, 7168, 2048)]
    weights = [torch.randn(shape, dtype=torch.bfloat16, device=options.device) for shape in shapes]
    times: dict[str, list[float]] = {}
    sides = sides_of(weights)
    for side in sides.values():
        side()
    replays = 10 if options.device == "cuda" else 1
    if options.device == "cuda":
        sides = {name: graphed(side, replays) for name, side in sides.items()}
    for _ in range(options.runs):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            times.setdefault(name, []).append((time.perf_counter() - started) / replays)
    nbytes = sum(weight.nbytes for weight in weights)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    print(
        f"{nbytes / 1e9:.2f} GB of BF16 on {device}, {options.runs} runs each: median (min-max) in ms",
        end="",
    )
    copy, own = median(times["copy"]), median(times["experts' matmuls forward and backward"])
    rows = [[k, spread([1000 * s for s in v]), f"{median(v) / copy:.2f}"] for k, v in times.items()]
    table(["", "ms", "x copy"], rows)
    both = median(times["compiled forward and backward"])
    most = 1.2 if options.device == "cuda" else 1.3
    print(f"compiled forward and backward / copy: {both / copy:.2f} {verdict(both / copy, most)}")
    print(f"the same / matmuls at {TOKENS} tokens an expert: {both / own:.1%} {verdict(both / own, 0.2)}")
    if "torchao eager forward" in times:
        ratio = median(times["eager forward"]) / median(times["torchao eager forward"])
        print(f"eager forward / torchao: {ratio:.2f} {verdict(ratio, 1)}")
    else:
        print("torchao is not installed; install it with `pip install --no-deps torchao` to compare")
    copies = saved_bytes(weights[0]) / weights[0][:1].nbytes
    print(f"kept for the backward: {copies:.2f} copies of the weight {verdict(copies, 1)}")
    machine()


if __name__ == "__main__":
    main()
