"""How far apart two models are, and how far a model's weights are from the grid."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.reference import packed as reference
from kconvert.proof.logits import Agreement, Routing, agreement, expert_modules, overlap
from kconvert.proof.parity.metrics import sqnr
from kconvert_qat.attach import Coverage
from kconvert_qat.config import QATConfig
from kconvert_qat.experts import ExpertWeight
from kconvert_qat.grid import fake_quantise

SAMPLED_GROUPS = 4096  # of each weight
SAMPLED_MATRICES = 8  # likewise


@dataclass(frozen=True)
class Parity:
    """A model's logits against those of a reference, over all positions.

    `sqnr` is in dB, None when they are equal; `experts` the mean share of routed experts that both choose, None where none are
    seen (ModuleLists).
    """

    agreement: Agreement
    sqnr: float | None
    cosine: float
    experts: float | None


def compare(reference: nn.Module, model: nn.Module, batches: Iterable[torch.Tensor]) -> Parity:
    """Compare two causal language models on batches of token ids [batch, positions]; all logits are held in memory."""
    batches = list(batches)
    expected, routing = _run(reference, batches)
    found, chosen = _run(model, batches)
    a, b = expected.double(), found.double()
    return Parity(
        agreement=agreement(expected, found),
        sqnr=sqnr(float(a.square().sum()), float((a - b).square().sum())),
        cosine=float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()),
        experts=overlap(routing, chosen),
    )


def _run(model: nn.Module, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, Routing]:
    """Logits f32 [positions, vocabulary] in evaluation mode, and what each layer's router chose for each batch."""
    training = model.training
    model.eval()
    routing: Routing = []
    hooks = []
    for module, names in expert_modules(model):

        def note(module: nn.Module, args: Any, kwargs: Any, names: Sequence[str] = names) -> None:
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            routing.append((given[names[0]], given[names[1]]))

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            logits = torch.cat([model(ids).logits.float().flatten(0, 1) for ids in batches])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return logits, routing


def weight_sqnr(covered: Coverage) -> dict[str, float | None]:
    """For each weight, by its key: dB of its values to what the grid changes in them, on a sample; None when it is nothing."""
    ratios = {}
    for weight in covered.weights:
        values = _sampled(weight, covered.config)
        signal = values.double().square().sum()
        noise = (values.double() - _served(values, covered.config).double()).square().sum()
        ratios[weight.key] = sqnr(float(signal), float(noise))
    return ratios


def sampled_codes(covered: Coverage) -> dict[str, torch.Tensor]:
    """The codes int8 [groups, group size] of a sample of each weight, the same one every time; of other grids than INT4 the
    values that they stand for."""
    config = covered.config
    codes = {}
    for weight in covered.weights:
        values = _sampled(weight, config).bfloat16()
        if config.grid == "int4":
            found = reference.quantise_exact(values.float(), CONVENTIONS[config.convention])[0].to(torch.int8)
        else:
            found = _served(values, config)
        codes[weight.key] = found
    return codes


def _served(values: torch.Tensor, config: QATConfig) -> torch.Tensor:
    return fake_quantise(values, config.group_size, config.convention, False, config.grid)


def _sampled(weight: ExpertWeight, config: QATConfig) -> torch.Tensor:
    """`sampled_groups`, or the first rows of some matrices where blocks have several."""
    if config.spec.rows == 1:
        return sampled_groups(weight, config.group_size)
    tensor = _own(weight)
    matrices = tensor.reshape(-1, *tensor.shape[-2:])
    return matrices[:: max(1, len(matrices) // SAMPLED_MATRICES), : config.spec.rows]


def changed_share(before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> dict[str, float]:
    """The share of codes that differ, for each weight."""
    return {key: float((codes != before[key]).double().mean()) for key, codes in now.items()}


def sampled_groups(weight: ExpertWeight, group_size: int) -> torch.Tensor:
    """Evenly spaced groups of the weight's own values [groups, group size]; of a sharded weight, of this rank's part."""
    groups = _own(weight).reshape(-1, group_size)
    return groups[:: max(1, len(groups) // SAMPLED_GROUPS)]


def _own(weight: ExpertWeight) -> torch.Tensor:
    """This rank's part, matrices [out, in]."""
    tensor = weight.tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.mT if weight.transposed else tensor
