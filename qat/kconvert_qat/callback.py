"""Quantisation-aware training under transformers' Trainer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kconvert.errors import KconvertError
from kconvert_qat.attach import Coverage, at_step, coverage
from kconvert_qat.config import CONFIG_NAME
from kconvert_qat.parity import changed_share, sampled_codes, sampled_groups, weight_sqnr

FINGERPRINT_NAME = "qat_fingerprint.json"


class QATCallback(TrainerCallback):
    """For a model that `prepare` was called on: begins after `start_step` steps, logs, and makes resuming safe.

    Each log gets the signal-to-noise ratio of the grid (`qat_sqnr`, in dB, and `qat_sqnr/<weight>`) and the share of codes
    that changed since this run began (`qat_changed`, and by weight), on a sample. A checkpoint gets the configuration and a
    fingerprint of the experts: Trainer's own resume was seen to leave fused experts as they were (transformers 5.23), which
    is then an error; load the model from the checkpoint with from_pretrained before resuming.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._covered = coverage(kwargs["model"])
        self._first = sampled_codes(self._covered)
        at_step(kwargs["model"], state.global_step)
        path = _checkpoint(args, state) / FINGERPRINT_NAME
        if state.global_step and path.exists() and json.loads(path.read_text()) != fingerprint(self._covered):
            raise KconvertError(
                f"the experts are not those of {path.parent}, which Trainer did not restore; load the model from there with "
                "from_pretrained before resuming"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        at_step(kwargs["model"], state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        found = self._measure()
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None:
                record.update(found)

    def _measure(self) -> dict[str, float]:
        ratios = {key: ratio for key, ratio in weight_sqnr(self._covered).items() if ratio is not None}
        changed = changed_share(self._first, sampled_codes(self._covered))
        found = {f"qat_sqnr/{key}": ratio for key, ratio in ratios.items()}
        found.update({f"qat_changed/{key}": share for key, share in changed.items()})
        if ratios:
            found["qat_sqnr"] = sum(ratios.values()) / len(ratios)
        return {**found, "qat_changed": sum(changed.values()) / len(changed)}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():
            (folder / CONFIG_NAME).write_text(self._covered.config.to_json())
            (folder / FINGERPRINT_NAME).write_text(json.dumps(fingerprint(self._covered)))


def fingerprint(covered: Coverage) -> dict[str, str]:
    """A hash of a sample of each expert weight."""
    size = covered.config.group_size
    return {weight.key: _hash(sampled_groups(weight, size)) for weight in covered.weights}


def _hash(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that Trainer saves this step in."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
