"""How far apart two models are, and how far a model's weights are from the grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.reference import packed as reference
from kconvert.qat.attach import Coverage
from kconvert.qat.distill import kl_divergence
from kconvert.qat.experts import MARKS, ExpertWeight
from kconvert.qat.grid import fake_quantise
from kconvert.quality import sqnr

SAMPLED_GROUPS = 4096  # of each weight


@dataclass(frozen=True)
class Parity:
    """Logits of a model against those of a reference, over all positions.

    `sqnr` is in dB, None when they are equal; `kl` is the mean KL(reference || model) in nats; `top1` the share of positions
    where both have the same best token; `routing` the share of chosen experts that both chose, None without fused experts.
    """

    positions: int
    max_abs: float
    sqnr: float | None
    cosine: float
    kl: float
    top1: float
    routing: float | None

    @property
    def is_exact(self) -> bool:
        return self.max_abs == 0


def compare(reference: nn.Module, model: nn.Module, batches: Iterable[torch.Tensor]) -> Parity:
    """Compare two causal language models on batches of token ids [batch, positions]."""
    totals = dict.fromkeys(("positions", "signal", "noise", "dot", "own", "kl", "top1", "chosen", "both"), 0.0)
    largest = 0.0
    for ids in batches:
        wanted, routes = _run(reference, ids)
        have, other_routes = _run(model, ids)
        error = have - wanted
        largest = max(largest, float(error.abs().max()))
        totals["positions"] += ids.numel()
        totals["signal"] += float(wanted.square().sum())
        totals["own"] += float(have.square().sum())
        totals["noise"] += float(error.square().sum())
        totals["dot"] += float((wanted * have).sum())
        totals["kl"] += float(kl_divergence(wanted, have).sum())
        totals["top1"] += float((wanted.argmax(-1) == have.argmax(-1)).sum())
        for ours, theirs in zip(routes, other_routes, strict=True):
            totals["chosen"] += ours.numel()
            totals["both"] += float((ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).sum())
    if not totals["positions"]:
        raise ValueError("there are no tokens to compare the models on")
    return Parity(
        positions=int(totals["positions"]),
        max_abs=largest,
        sqnr=sqnr(totals["signal"], totals["noise"]),
        cosine=totals["dot"] / math.sqrt(totals["signal"] * totals["own"]),
        kl=totals["kl"] / totals["positions"],
        top1=totals["top1"] / totals["positions"],
        routing=totals["both"] / totals["chosen"] if totals["chosen"] else None,
    )


def _run(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits in f64 and, of each layer with fused experts, the experts chosen [tokens, k]."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _routes(model) as routes:
            logits = model(ids).logits.double()
    finally:
        model.train(training)
    return logits, routes


@contextmanager
def _routes(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    routes: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routes.append((args[1] if len(args) > 1 else kwargs["top_k_index"]).detach().clone())

    marked = [module for module in model.modules() if all(hasattr(module, mark) for mark in MARKS)]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in marked]
    try:
        yield routes
    finally:
        for hook in hooks:
            hook.remove()


def weight_sqnr(covered: Coverage) -> dict[str, float | None]:
    """For each weight, by its key: dB of its values to what the grid changes in them, on a sample; None when it is nothing."""
    ratios = {}
    for weight in covered.weights:
        values = sampled_groups(weight, covered.config.group_size)
        served = fake_quantise(values, covered.config.group_size, covered.config.convention)
        signal, noise = values.double().square().sum(), (values.double() - served.double()).square().sum()
        ratios[weight.key] = sqnr(float(signal), float(noise))
    return ratios


def sampled_codes(covered: Coverage) -> dict[str, torch.Tensor]:
    """The codes int8 [groups, group size] of a sample of each weight, the same one every time."""
    rule = CONVENTIONS[covered.config.convention]
    codes = {}
    for weight in covered.weights:
        values = sampled_groups(weight, covered.config.group_size).bfloat16().float()
        codes[weight.key] = reference.quantise_exact(values, rule)[0].to(torch.int8)
    return codes


def changed_share(before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> dict[str, float]:
    """The share of codes that differ, for each weight."""
    return {key: float((codes != before[key]).double().mean()) for key, codes in now.items()}


def sampled_groups(weight: ExpertWeight, group_size: int) -> torch.Tensor:
    """Evenly spaced groups of the weight's own values [groups, group size]; of a sharded weight, of this rank's part."""
    tensor = weight.tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    groups = (tensor.mT if weight.transposed else tensor).reshape(-1, group_size)
    return groups[:: max(1, len(groups) // SAMPLED_GROUPS)]
