"""`kconvert launch`."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from kconvert.cli.options import Size, json_option, links_option, location, location_or_gguf, revision_option
from kconvert.errors import KconvertError

ENGINES = ("vllm", "sglang", "ktransformers", "llama.cpp", "mlx")


class Gigabytes(Size):
    """A size, of which a number alone counts GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        found = super().convert(f"{text}GB" if text.replace(".", "", 1).isdecimal() else text, param, ctx)
        if found < 1000**2:
            self.fail(f"{value!r} is no memory of a GPU; give its GB", param, ctx)
        return found


@click.command()
@click.argument("source", metavar="DIR", type=location_or_gguf)
@click.argument("more", metavar="[-- FLAGS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--engine", required=True, type=click.Choice(ENGINES), help="What is to serve it.")
@click.option("--gpus", type=click.IntRange(1, 1024), help="GPUs that share the model.")
@click.option("--gpu-memory", type=Gigabytes(), metavar="GB", help="Memory of each: say whether the model fits.")
@click.option("--context", type=click.IntRange(1), help="Longest sequence in tokens [default: the model's].")
@click.option("--gpu-experts", type=click.IntRange(0), help="KTransformers: experts of each layer on the GPUs.")
@click.option("--cores", type=click.IntRange(1, 4096), help="KTransformers: CPU cores [default: those here].")
@click.option(
    "--numa", type=click.IntRange(1, 64), help="KTransformers: NUMA nodes [default: the AMX weights', or those here]."
)
@click.option("--source", "made_from", type=location, metavar="SRC", help="What AMX weights in DIR were made from.")
@click.option("--exec", "run", is_flag=True, help="Run the command in place of kconvert.")
@revision_option
@links_option
@json_option
def launch(source: str, more: tuple[str, ...], engine: str, run: bool, as_json: bool, **options: Any) -> None:
    """Print the command that serves what is in DIR, a directory, GGUF file, Hub id or s3://…; refuse what ENGINE cannot run.

    The command goes to stdout, what is worth knowing to stderr. FLAGS behind `--` are handed on to the engine.

    \b
    Example: kconvert launch ./Kimi-K2-Thinking --engine vllm --gpus 8 --gpu-memory 141
             kconvert launch ./Kimi-K2-Thinking-AMXINT4-NUMA2 --engine ktransformers --cores 56 --exec -- --port 8000
    """
    from kconvert.serving.launch import launch as plan_launch
    from kconvert.serving.place import look_at
    from kconvert.serving.wishes import Wishes

    place = look_at(source, options.pop("revision"))
    found = plan_launch(place, engine, Wishes(source=options.pop("made_from"), more=more, **options))
    for note in () if as_json else found.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(json.dumps(found.as_dict(), indent=2) if as_json else found.line)
    if run:
        try:
            os.execvp(found.command[0], list(found.command))
        except OSError as error:
            raise KconvertError(
                f"{found.command[0]} cannot be started ({error.strerror}); install {found.engine.package} where it is to run"
            ) from None
