"""Plots of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_training(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss, the grid's signal-to-noise ratio and the share of changed codes over the steps, as a PNG."""
    from matplotlib.figure import Figure

    curves = {"loss": "loss", "qat_sqnr": "SQNR of the grid, dB", "qat_changed": "changed codes"}
    figure = Figure(figsize=(6, 7), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(len(curves), sharex=True), curves.items(), strict=True):
        points = [(record["step"], record[key]) for record in log if key in record]
        axes.plot([step for step, _ in points], [value for _, value in points])
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=120)
