"""How much of what a grid loses does quantisation-aware training win back? An experiment that runs on two CPU cores.

A small DeepSeek-V3-like mixture of experts is trained from scratch on the sources of Python's standard library, by a
byte-level BPE made on the spot. From there it is fine-tuned in several ways, with the same steps on the same batches:

    BF16     no grid; this is also the teacher, and the reference of KL and top-1
    PTQ      the BF16 model, its experts rounded to the grid, INT4 or MXFP4, after training
    QAT      trained with fake-quantised experts
    QAT+KD   the same, distilled from the BF16 model

Its experts carry nearly all of its function: no dense layer, no shared expert, one narrow attention head. A model that leans
on parts which stay in BF16 is hardly hurt by rounded experts, and then there is nothing to win back.

All are measured on the same held-out files. Recovered is (PTQ - QAT) / (PTQ - BF16), in held-out loss; distillation would
help a BF16 model as well, so above 100% is no merit of the grid. Each seed is a process with one thread: matrices this small
gain little from a second one.

    python examples/qat_recovery.py --grid mxfp4 --output qat_recovery
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    DeepseekV3Config,
    PreTrainedTokenizerFast,
    set_seed,
)

from kconvert_qat import QATConfig, export, prepare
from kconvert_qat.distill import distillation_loss, kl_divergence
from kconvert_qat.parity import compare

VOCABULARY = 512
BLOCK = 128
BATCH = 8
HELD_OUT = 25  # every so many files are held out
WAYS = ("PTQ", "QAT", "QAT+KD")


@dataclass(frozen=True)
class Row:
    """One way of making a model, by one seed; losses in nats a token."""

    seed: int
    way: str
    group: int
    loss: float
    kl: float
    top1: float


def read_corpus(most: int | None) -> tuple[str, str]:
    """Sources of the standard library to train on, and held out; of so many files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    files = [path for path in files if not {"site-packages", "test", "tests", "idlelib"} & set(path.parts)]
    texts = [path.read_text("utf-8", errors="replace") for path in files[:most]]
    held_out = "".join(texts[::HELD_OUT])
    del texts[::HELD_OUT]
    return "".join(texts), held_out


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text[:2_000_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def blocks(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Token ids [blocks, BLOCK]."""
    pieces = [text[k : k + 100_000] for k in range(0, len(text), 100_000)]
    ids = [token for encoded in tokenizer.backend_tokenizer.encode_batch(pieces) for token in encoded.ids]
    return torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)


def make_model() -> nn.Module:
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        first_k_dense_replace=0,
        n_routed_experts=8,
        n_shared_experts=0,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=BLOCK,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="grouped_mm")


def batches(data: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield data[torch.randint(len(data), (BATCH,), generator=order)]


def fit(
    model: nn.Module,
    data: torch.Tensor,
    steps: int,
    peak: float,
    seed: int,
    config: QATConfig | None = None,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """AdamW with a cosine schedule down to nothing and a warm-up of 5%."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warm_up = max(1, steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    model.train()
    for ids in batches(data, steps, seed):
        with torch.no_grad():
            target = None if teacher is None else teacher(ids).logits
        loss = distillation_loss(model(ids).logits, target, ids, config or QATConfig())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()


def run_seed(seed: int, data: torch.Tensor, held_out: torch.Tensor, options: argparse.Namespace) -> list[Row]:
    """Every row of one seed; the masters of the first seed's last model are saved."""
    torch.set_num_threads(1)
    set_seed(seed)
    base = fit(make_model(), data, options.pretrain, options.pretrain_rate, seed)
    tuned = {"data": data, "steps": options.steps, "peak": options.rate, "seed": 1000 + seed}
    reference = fit(copy.deepcopy(base), **tuned)
    rows = [measure(reference, reference, held_out, seed, "BF16", 0)]
    for way in WAYS:
        distillation = 0.5 if way == "QAT+KD" else 0.0
        config = QATConfig(grid=options.grid, group_size=options.group, distillation=distillation)
        model = copy.deepcopy(reference if way == "PTQ" else base)
        prepare(model, config)
        if way != "PTQ":
            fit(model, **tuned, config=config, teacher=reference if way == "QAT+KD" else None)
        rows.append(measure(model, reference, held_out, seed, way, options.group))
    if seed == 0:
        model.save_pretrained(options.output / "masters")
    return rows


def measure(model: nn.Module, reference: nn.Module, held_out: torch.Tensor, seed: int, way: str, group: int) -> Row:
    """Mean loss of the model, and how far it is from the reference."""
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for ids in held_out.split(BATCH):
            logits, expected = model(ids).logits[:, :-1], reference(ids).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            same = (logits.argmax(-1) == expected.argmax(-1)).sum()
            sums += torch.stack([loss, kl_divergence(expected, logits).sum(), same]).double()
    loss, kl, top1 = (sums / held_out[:, 1:].numel()).tolist()
    print(f"seed {seed}: {way}{f', group {group}' if group else ''}, held-out loss {loss:.4f}", flush=True)
    return Row(seed, way, group, loss, kl, top1)


def check_export(tokenizer: PreTrainedTokenizerFast, folder: Path, grid: str, group: int, ids: torch.Tensor) -> bool:
    """Whether the exported checkpoint, loaded by transformers in BF16, computes the trainer's logits bit for bit."""
    shipped = AutoModelForCausalLM.from_pretrained(folder / "masters", dtype=torch.bfloat16)
    prepare(shipped, QATConfig(grid=grid, group_size=group))
    export(shipped, folder / grid, tokenizer=tokenizer, overwrite=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / grid, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    return compare(shipped, loaded, [ids]).agreement.max_abs == 0


def table(rows: list[Row]) -> str:
    """A line for each way, means over the seeds (with the standard deviation)."""
    lines = ["way      group  held-out loss     above BF16          KL      top-1   recovered (each seed)"]
    for way, group in dict.fromkeys((row.way, row.group) for row in rows):
        of = [row for row in rows if (row.way, row.group) == (way, group)]
        lost, above = gaps(rows, "PTQ", group), gaps(rows, way, group)
        each = [1 - a / b for a, b in zip(above, lost, strict=False)]
        # Of the mean losses, in which no seed with a small gap counts for more than the others.
        won = f"{1 - mean(above) / mean(lost):.0%} ({', '.join(f'{r:.0%}' for r in each)})" if "QAT" in way else ""
        lines.append(
            f"{way:8} {group or '':>5}  {spread([row.loss for row in of])}   {spread(above)}   "
            f"{mean(row.kl for row in of):.5f}  {mean(row.top1 for row in of):.4f}  {won}".rstrip()
        )
    return "\n".join(lines)


def gaps(rows: list[Row], way: str, group: int) -> list[float]:
    """How far each seed's held-out loss is above its BF16 model's."""
    best = {row.seed: row.loss for row in rows if row.way == "BF16"}
    return [row.loss - best[row.seed] for row in rows if (row.way, row.group) == (way, group)]


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ({stdev(values) if len(values) > 1 else 0:.4f})"


def plot(rows: list[Row], grid: str, group: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3.5), layout="constrained")
    axes = figure.subplots()
    above = [gaps(rows, way, group) for way in WAYS]
    axes.bar(WAYS, [mean(values) for values in above], color=["C3", "C0", "C2"], alpha=0.6)
    for k, values in enumerate(above):
        axes.plot([k] * len(values), values, "k.")
    axes.axhline(0, color="black", lw=0.8)
    axes.set_title(f"{grid.upper()}, group {group}")
    axes.set_ylabel("held-out loss above BF16, nats a token")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("qat_recovery"), help="[qat_recovery]")
    parser.add_argument("--grid", choices=("int4", "mxfp4"), default="int4", help="[int4]")
    parser.add_argument("--group", type=int, default=32, help="values of a group; of int4 128, too [32]")
    parser.add_argument("--seeds", type=int, default=3, help="[3]")
    parser.add_argument("--pretrain", type=int, default=3500, help="steps from scratch [3500]")
    parser.add_argument("--pretrain-rate", type=float, default=1e-2, help="their peak learning rate [1e-2]")
    parser.add_argument("--steps", type=int, default=2500, help="of fine-tuning [2500]")
    parser.add_argument("--rate", type=float, default=7e-4, help="their peak learning rate [7e-4]")
    parser.add_argument("--files", type=int, help="of the standard library [all]")
    parser.add_argument("--held-out", type=int, help="blocks to measure on [all of the held-out files]")
    options = parser.parse_args()
    started = time.monotonic()
    text, unseen = read_corpus(options.files)
    tokenizer = make_tokenizer(text)
    data, held_out = blocks(tokenizer, text), blocks(tokenizer, unseen)[: options.held_out]
    print(f"{data.numel():,} tokens to train on, {held_out.numel():,} held out", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.seeds, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(run_seed, seed, data, held_out, options) for seed in range(options.seeds)]
        rows = [row for seed in running for row in seed.result()]
    (options.output / "rows.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    plot(rows, options.grid, options.group, options.output / "recovery.png")
    print(table(rows))
    print(
        "the exported checkpoint computes the trainer's logits bit for bit:",
        check_export(tokenizer, options.output, options.grid, options.group, held_out[:BATCH]),
    )
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
