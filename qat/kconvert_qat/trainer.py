"""Fine-tuning of a checkpoint on text files with fake-quantised experts, up to what is shipped: `kconvert qat train`.

OUTPUT gets `masters` (the trained weights), a directory called as the grid (what is shipped), `log.json` and `training.png`,
and while it runs `checkpoints`. The same request again goes on from the last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kconvert.address import open_checkpoint
from kconvert.dialects import quantization_tables
from kconvert.errors import KconvertError
from kconvert.proof.logits import architecture
from kconvert_qat.attach import at_step, prepare
from kconvert_qat.callback import QATCallback
from kconvert_qat.config import QATConfig
from kconvert_qat.distill import distillation_loss
from kconvert_qat.export import export, plan_export
from kconvert_qat.load import load
from kconvert_qat.plots import plot_training

MASTERS = {"f32": torch.float32, "bf16": torch.bfloat16}
HELD_OUT = 20  # of so many blocks one is held out, up to MOST_HELD_OUT
MOST_HELD_OUT = 64
REQUEST_NAME = "request.json"
Advance = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class TrainRequest:
    """`model` is a checkpoint that transformers knows, with its tokenizer, plain or quantised; `text` are files of UTF-8.

    `source` is the quantised checkpoint that `model` was converted from, or `model` itself where that is quantised: its grid
    must be the one in `config`, and the output takes its config.json and side files. `teacher` is a checkpoint, for
    `config.distillation` above 0. Sequences have `block` tokens. The optimiser is AdamW with a cosine schedule and a warm-up
    of 5%; `masters` is the dtype of the weights that it updates (in bf16 most updates at such a learning rate are rounded
    away). `for_transformers` is that of `export`, asked before the training.
    """

    model: Path
    text: tuple[Path, ...]
    output: Path
    steps: int
    config: QATConfig = field(default_factory=QATConfig)
    source: Path | None = None
    teacher: Path | None = None
    learning_rate: float = 1e-5
    batch_size: int = 8
    block: int = 512
    masters: str = "f32"
    save_every: int = 100
    gradient_checkpointing: bool = False
    for_transformers: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.teacher is None) != (self.config.distillation == 0):
            raise KconvertError("a teacher and a distillation weight above 0 go together; give both or neither")
        if self.masters not in MASTERS:
            raise KconvertError(f"there are no masters in {self.masters!r}; there are {', '.join(MASTERS)}")
        if not 0 < self.learning_rate < 1:
            raise KconvertError(f"a learning rate of {self.learning_rate} cannot train; it must be between 0 and 1")

    @property
    def shipped(self) -> Path:
        return self.output / self.config.grid

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, default=str) + "\n"


@dataclass(frozen=True)
class Outcome:
    """Held-out cross-entropy in nats a token: of the model as it came, on the grid before training, and after."""

    output: Path
    covered: str
    steps: int
    loss_before: float
    loss_quantised: float
    loss_trained: float
    shipped: Path


def train(request: TrainRequest, advance: Advance | None = None) -> Outcome:
    """Carry out `request`, or go on where an interrupted run of the same request was.

    `advance` is called with the number of steps done, and with what Trainer logs when it does.
    """
    if request.source is None and is_quantised(request.model):
        request = replace(request, source=request.model)
    origin = None if request.source is None else open_checkpoint(request.source)
    _check_output(request)
    transformers.set_seed(request.seed)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    training, held_out = _blocks(request, tokenizer)
    last = _last_checkpoint(request.output / "checkpoints")
    model = load_model(request.model, MASTERS[request.masters])
    before = held_out_loss(model, held_out)
    covered = prepare(model, request.config)
    plan_export(model, source=request.source, for_transformers=request.for_transformers)
    at_step(model, request.config.start_step)
    quantised = held_out_loss(model, held_out)
    if last is not None:  # Trainer does not restore fused experts
        model = load_model(Path(last), MASTERS[request.masters])
        prepare(model, request.config)
    if request.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    teacher = _load_teacher(request, model)
    _claim(request)
    trainer = QATTrainer(request, model, teacher, training, advance or (lambda step, logs: None))
    trainer.train(resume_from_checkpoint=last)
    shipped = _save_masters(request, model, trainer.state.log_history, tokenizer)
    prepare(shipped, replace(request.config, start_step=0))
    trained = held_out_loss(shipped, held_out)
    export(
        shipped,
        request.shipped,
        source=None if origin is None else origin.root,
        tokenizer=tokenizer,
        overwrite=True,
        for_transformers=request.for_transformers,
    )
    return Outcome(request.output, str(covered), request.steps, before, quantised, trained, request.shipped)


def is_quantised(path: Path) -> bool:
    """Whether config.json of the checkpoint in `path` declares codes."""
    return any(quantization_tables(open_checkpoint(path).config))


def load_model(path: Path, dtype: torch.dtype) -> Any:
    """The causal language model in `path`, by the class that its config.json names where transformers has it (Kimi-K2).

    A quantised one is decoded on the way.
    """
    known: Any = getattr(transformers, architecture(open_checkpoint(path).config), None)
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        known = None
    try:
        config = (known.config_class if known else AutoConfig).from_pretrained(path)
        config.model_type = type(
            config
        ).model_type  # by which transformers finds how the experts of the class are fused
        if is_quantised(path):
            model = _blank(known, config, dtype)
            load(model, path)
        else:
            model = (known or AutoModelForCausalLM).from_pretrained(path, config=config, dtype=dtype)
    except (ValueError, OSError, KeyError) as error:
        raise KconvertError(f"{path} cannot be loaded by transformers: {str(error).splitlines()[0]}") from None
    model.config.use_cache = False
    return model


def _blank(known: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model without values, and without a word of its quantisation."""
    del config.quantization_config
    make: Any = known._from_config if known else AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return make(config, dtype=dtype)


def held_out_loss(model: Any, blocks: torch.Tensor, batch: int = 8) -> float:
    """Mean cross-entropy of `model` in nats a token, over blocks of token ids."""
    training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(blocks), batch):
            ids = blocks[first : first + batch].to(model.device)
            logits = model(ids).logits[:, :-1].float().flatten(0, 1)
            total += float(functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
    model.train(training)
    return total / blocks[:, 1:].numel()


def silence_transformers() -> None:
    """No progress bars and advice of its own, for a command that has its own."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class QATTrainer(Trainer):
    """transformers' Trainer with our loss and callback, and without its own output."""

    def __init__(self, request: TrainRequest, model: Any, teacher: Any, blocks: torch.Tensor, advance: Advance) -> None:
        data = [{"input_ids": ids, "labels": ids} for ids in blocks]
        super().__init__(model, _arguments(request), train_dataset=data, callbacks=[QATCallback()])
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(Progress(advance))
        self.model_accepts_loss_kwargs = False
        self._config = request.config
        self._teacher = None if teacher is None else teacher.to(model.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, ids = inputs["labels"], inputs["input_ids"]
        outputs = model(input_ids=ids)
        teacher = None
        if self._teacher is not None:
            with torch.no_grad():
                teacher = self._teacher(input_ids=ids).logits
        loss = distillation_loss(outputs.logits, teacher, labels, self._config)
        return (loss, outputs) if return_outputs else loss


class Progress(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._advance(state.global_step, {})

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        self._advance(state.global_step, logs or {})


def _arguments(request: TrainRequest) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(request.output / "checkpoints"),
        max_steps=request.steps,
        per_device_train_batch_size=request.batch_size,
        learning_rate=request.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(0.05 * request.steps)),
        logging_steps=max(1, min(10, request.steps // 10)),
        save_steps=request.save_every,
        save_total_limit=2,
        use_cpu=not torch.cuda.is_available(),
        seed=request.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _load_teacher(request: TrainRequest, model: Any) -> Any:
    """The teacher in BF16; KconvertError when its logits are of another vocabulary."""
    if request.teacher is None:
        return None
    teacher = load_model(request.teacher, torch.bfloat16).eval()
    sizes = [each.get_output_embeddings().weight.shape[0] for each in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise KconvertError(
            f"{request.teacher} has a vocabulary of {sizes[0]:,}, but {request.model} one of {sizes[1]:,}"
        )
    return teacher


def _check_output(request: TrainRequest) -> None:
    """KconvertError when OUTPUT holds anything but this request, interrupted."""
    path = request.output / REQUEST_NAME
    if path.exists() and path.read_text() != request.to_json():
        raise KconvertError(f"{request.output} holds a training with other settings; choose another directory")
    if not path.exists() and request.output.exists() and any(request.output.iterdir()):
        raise KconvertError(f"{request.output} is not empty; choose another directory")


def _claim(request: TrainRequest) -> None:
    """Take OUTPUT for this request, which can be carried out."""
    try:
        request.output.mkdir(parents=True, exist_ok=True)
        (request.output / REQUEST_NAME).write_text(request.to_json())
    except OSError as error:
        raise KconvertError(f"cannot write to {request.output}: {error.strerror}") from None


def _last_checkpoint(folder: Path) -> str | None:
    """The latest that is whole: Trainer writes its state last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _blocks(request: TrainRequest, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [blocks, block] to train on, and held out; every HELD_OUT-th block of the text, at most MOST_HELD_OUT."""
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for path in request.text:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KconvertError(f"{path} cannot be read as UTF-8 text: {error}") from None
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    blocks = torch.tensor(ids[: len(ids) // request.block * request.block]).view(-1, request.block)
    if len(blocks) < 2:
        raise KconvertError(
            f"the text has {len(ids):,} tokens, which is less than two blocks of {request.block}; give more"
        )
    chosen = torch.zeros(len(blocks), dtype=torch.bool)
    chosen[HELD_OUT - 1 :: HELD_OUT] = True
    chosen[-1] = chosen[-1] or not bool(chosen.any())
    held_out = blocks[chosen][:MOST_HELD_OUT]
    return blocks[~chosen], held_out


def _save_masters(request: TrainRequest, model: Any, log: list[dict[str, float]], tokenizer: Any) -> Any:
    """Write the trained weights and the log; returns the model as it is shipped, in BF16 but for what stays in F32."""
    (request.output / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    plot_training(log, request.output / "training.png")
    masters = request.output / "masters"
    model.save_pretrained(masters)
    tokenizer.save_pretrained(masters)
    return load_model(masters, torch.bfloat16)
