"""`kconvert qat`: quantisation-aware training."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kconvert.cli.options import json_option, links_option, quiet_option
from kconvert.errors import KconvertError

GRIDS = ("int4", "mxfp4", "nvfp4", "fp8-block")
KEPT = ("backward", "served", "codes", "nothing")
directory = click.Path(file_okay=False, path_type=Path)
text_file = click.Path(exists=True, dir_okay=False, path_type=Path)


class TextCommand(click.Command):
    """A command whose option --text takes all files up to the next option, as a shell makes them of a glob."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spelled, taking = [], False
        for arg in args:
            if arg.startswith("-"):
                taking = arg == "--text"
            if arg != "--text":
                spelled += ["--text", arg] if taking else [arg]
        return super().parse_args(ctx, spelled)


@click.group()
def qat() -> None:
    """Train a model's experts on the exact grid that is shipped.

    \b
    Example: kconvert qat train --model ./bf16 --text corpus/*.txt --steps 1000 --output ./trained
    """


@qat.command(cls=TextCommand)
@click.option(
    "--model", required=True, type=directory, help="The checkpoint to train, plain or quantised, with its tokenizer."
)
@click.option(
    "--text",
    required=True,
    multiple=True,
    type=text_file,
    metavar="FILES...",
    help="To train on, in UTF-8; repeatable.",
)
@click.option("--steps", required=True, type=click.IntRange(1), help="Optimiser steps.")
@click.option("--output", required=True, type=directory, help="Where everything goes.")
@click.option("--source", type=directory, help="The quantised checkpoint that MODEL was made from.")
@click.option("--teacher", type=directory, help="A checkpoint to distil from, mostly MODEL.")
@click.option("--distillation", type=click.FloatRange(0, 1), help="Weight of the teacher [default: 0.5 with one].")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Softens both distributions.")
@click.option("--grid", type=click.Choice(GRIDS), default=GRIDS[0], show_default=True, help="What is shipped.")
@click.option("--convention", default="", help="The rule that makes codes [default: the grid's first; kimi for int4].")
@click.option("--group-size", type=click.IntRange(8), default=None, help="Inputs to a scale [default: 32 for int4].")
@click.option("--keep", type=click.Choice(KEPT), default=KEPT[0], show_default=True, help="Of the grid, within a step.")
@click.option("--target", "targets", multiple=True, help="Role or glob of names; repeatable [default: every expert].")
@click.option("--start-step", type=click.IntRange(0), default=0, show_default=True, help="Steps without the grid.")
@click.option(
    "--gradient", type=click.Choice(["straight-through", "clip"]), default="straight-through", show_default=True
)
@click.option("--learning-rate", type=float, default=1e-5, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--block", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a sequence.")
@click.option(
    "--masters", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True, help="Trained weights."
)
@click.option("--save-every", type=click.IntRange(1), default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--gradient-checkpointing", is_flag=True, help="Keep the quantised experts of one layer at a time.")
@click.option(
    "--for-transformers/--not-for-transformers", default=True, show_default=True, help="Only what that loads."
)
@click.option("--seed", type=int, default=0, show_default=True)
@links_option
@json_option
@quiet_option
def train(text: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Fine-tune MODEL on text with fake-quantised experts, and write its quantised checkpoint.

    OUTPUT gets a directory called as the grid (what is shipped: its weights are the values that training saw, bit for bit),
    `masters`, `log.json` and `training.png`. Run the same command again to go on after an interruption.

    \b
    Example: kconvert qat train --model ./bf16 --text corpus/*.txt --steps 1000 --teacher ./bf16 --output ./trained
    """
    try:
        from kconvert_qat.trainer import TrainRequest
        from kconvert_qat.trainer import train as run
    except ImportError as error:
        raise KconvertError(f"{error.name} is missing; install it with `pip install 'kconvert-toolkit[qat]'`") from None

    from kconvert_qat import QATConfig

    if options["distillation"] is None:
        options["distillation"] = 0.5 if options["teacher"] else 0.0
    options["group_size"] = options["group_size"] or 0
    options["targets"] = options["targets"] or ("expert",)
    grid = {name: options.pop(name) for name in tuple(options) if name in QATConfig.__dataclass_fields__}
    request = TrainRequest(text=text, config=QATConfig(**grid), **options)
    outcome = _run(run, request, quiet)
    if as_json:
        click.echo(json.dumps(asdict(outcome), indent=2, default=str))
    elif not quiet:
        click.echo(
            f"wrote {outcome.shipped}: {outcome.covered}\n"
            f"held-out loss: {outcome.loss_before:.4f} as it came, {outcome.loss_quantised:.4f} on the grid before training, "
            f"{outcome.loss_trained:.4f} after {outcome.steps:,} steps"
        )


def _run(train: Any, request: Any, quiet: bool) -> Any:
    from tqdm import tqdm

    from kconvert_qat.trainer import silence_transformers

    silence_transformers()
    with tqdm(total=request.steps, unit="step", disable=quiet or not sys.stderr.isatty()) as bar:

        def advance(step: int, logs: dict[str, Any]) -> None:
            bar.update(step - bar.n)
            shown = {key: logs[key] for key in ("loss", "qat_sqnr", "qat_changed") if key in logs}
            if shown:
                bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()})

        return train(request, advance)
