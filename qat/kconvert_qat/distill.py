"""Distillation: the student learns the BF16 teacher's distribution beside the labels."""

from __future__ import annotations

import torch
from torch.nn import functional

from kconvert_qat.config import QATConfig

IGNORED = -100  # a label that counts for nothing, as in transformers


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of each position, from logits [..., vocabulary]; in f32, times the temperature squared.

    The square keeps gradients at the size that they have without softening (Hinton et al., 2015).
    """
    target = functional.log_softmax(teacher.float() / temperature, -1)
    have = functional.log_softmax(student.float() / temperature, -1)
    return functional.kl_div(have, target, reduction="none", log_target=True).sum(-1) * temperature**2


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor, config: QATConfig
) -> torch.Tensor:
    """(1 - distillation) * cross-entropy + distillation * KL, the mean over labelled positions.

    Logits [batch, positions, vocabulary] predict the label [batch, positions] of the next position. No teacher: the
    cross-entropy alone.
    """
    following = labels[:, 1:]
    logits = student[:, :-1]
    loss = functional.cross_entropy(logits.float().flatten(0, 1), following.flatten(), ignore_index=IGNORED)
    if teacher is None:
        return loss
    counts = following != IGNORED
    divergence = kl_divergence(teacher[:, :-1][counts], logits[counts], config.temperature).mean()
    return (1 - config.distillation) * loss + config.distillation * divergence
