"""`kconvert int4-to-bf16` and its siblings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

from kconvert.cli.options import attention_option, conversion, layout_option, packed_options, rest_option, scales_option
from kconvert.cli.running import carry_out, pinned
from kconvert.targets.base import MIXED
from kconvert.targets.registry import TARGETS


@click.command("int4-to-bf16")
@conversion
def int4_to_bf16(source: str, destination: str, **options: Any) -> None:
    """Convert the INT4 checkpoint SRC to BF16 in DST; run it again to go on after an interruption.

    \b
    Example: kconvert int4-to-bf16 ./Kimi-K2-Thinking ./Kimi-K2-Thinking-BF16
    """
    _convert(source, destination, to="bf16", expect="int4", **options)


@click.command("int4-to-fp8")
@conversion
@layout_option("fp8")
@scales_option
def int4_to_fp8(source: str, destination: str, **options: Any) -> None:
    """Convert the INT4 checkpoint SRC to FP8 in DST.

    \b
    experts                     128x128 blocks, routed experts only; the rest stays bit for bit (the default)
    all                         128x128 blocks, every Linear: the layout of DeepSeek-V3 and Kimi-K2-Instruct
    compressed-tensors          128x128 blocks as llm-compressor's FP8_BLOCK
    compressed-tensors-channel  a scale for each row, as llm-compressor's FP8_DYNAMIC
    vllm, sglang                DeepSeek-V4 as these engines want it, and nothing else

    \b
    Example: kconvert int4-to-fp8 ./Kimi-K2-Thinking ./Kimi-K2-Thinking-FP8
    """
    _convert(source, destination, to="fp8", expect="int4", **options)


@click.command("fp8-to-bf16")
@conversion
def fp8_to_bf16(source: str, destination: str, **options: Any) -> None:
    """Convert the FP8 checkpoint SRC to BF16 in DST.

    \b
    Example: kconvert fp8-to-bf16 ./Kimi-K2-Instruct ./Kimi-K2-Instruct-BF16
    """
    _convert(source, destination, to="bf16", expect="fp8", **options)


@click.command("bf16-to-int4")
@conversion
@packed_options
def bf16_to_int4(source: str, destination: str, **options: Any) -> None:
    """Convert the BF16 checkpoint SRC to INT4 in DST, its routed experts only.

    If SRC was INT4 once, its codes and scales are found again, bit for bit; groups where there are none are quantised by
    the convention's rule and counted, or refused with --require-exact.

    \b
    Example: kconvert bf16-to-int4 ./Kimi-K2-Thinking-BF16 ./Kimi-K2-Thinking --require-exact
    """
    _convert(source, destination, to="int4", expect="bf16", **options)


@click.command("fp8-to-int4")
@conversion
@packed_options
def fp8_to_int4(source: str, destination: str, **options: Any) -> None:
    """Convert the FP8 checkpoint SRC to INT4 in DST, its routed experts only; the rest becomes BF16.

    \b
    Example: kconvert fp8-to-int4 ./Kimi-K2-Instruct ./Kimi-K2-Instruct-INT4
    """
    _convert(source, destination, to="int4", expect="fp8", **options)


@click.command()
@conversion
@packed_options
@click.option("--to", type=click.Choice(list(TARGETS)), help="The encoding to write.")
@click.option(
    "--recipe", metavar="FILE", help="In its place: a TOML file, or the name of a preset, says which weights get which."
)
@layout_option(*TARGETS)
@rest_option
@attention_option
def convert(source: str, destination: str, to: str | None, recipe: str | None, **options: Any) -> None:
    """Convert the checkpoint SRC, in any encoding that can be read, to another one in DST.

    `--to mlx` writes what mlx-lm loads, with the codes and scales that SRC has (INT4, MXFP4, MXFP8), and the rest in BF16.

    \b
    Example: kconvert convert ./Kimi-K2-Thinking ./Kimi-K2-Thinking-BF16 --to bf16
             kconvert convert ./Kimi-K2-Thinking ./Kimi-K2-Thinking-GGUF --to gguf --shard-size 50GB
    """
    if (to is None) == (recipe is None):
        raise click.UsageError("give either --to or --recipe")
    if recipe is not None:
        from kconvert.targets.mixed.rules import read_mix

        options["mix"] = read_mix(recipe, options.pop("layout") or "")
    _convert(source, destination, to=to or MIXED, expect=None, **options)


def _convert(
    source: str,
    destination: str,
    *,
    to: str,
    expect: str | None,
    revision: str | None,
    **options: Any,
) -> None:
    import kconvert

    # What a command does not offer keeps the recipe's default.
    names = options.keys() & {field.name for field in fields(kconvert.Recipe)}
    chosen = {name: options.pop(name) for name in names}
    recipe = kconvert.Recipe(to, expect, **{name: value for name, value in chosen.items() if value is not None})
    carry_out(kconvert.plan(source, recipe, pinned(source, destination, revision, **options)), destination, **options)
