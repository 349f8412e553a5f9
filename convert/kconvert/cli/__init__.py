"""The `kconvert` command, a module for each group of commands.

The only code that prints; heavy modules are imported when a command runs.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from kconvert.cli import check, conversions, diff, finalize, inspect, launch, qat, repack, sample, smoke, verify
from kconvert.errors import CheckFailed, KconvertError, explain_os_error
from kconvert.version import __version__


class Group(click.Group):
    """Turns our errors into one sentence on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CheckFailed as error:
            _fail("failed", str(error), 1)
        except KconvertError as error:
            _fail("error", str(error), 2)
        except KeyboardInterrupt:
            _fail("interrupted", "run the same command again; a conversion goes on from here", 130)
        except BrokenPipeError:
            sys.exit(0)
        except OSError as error:
            _fail("error", str(explain_os_error(error, f"cannot {ctx.invoked_subcommand}")), 2)


def _fail(kind: str, message: str, code: int) -> None:
    click.echo(f"{click.style(kind, fg='red')}: {message}", err=True)
    sys.exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="kconvert")
def main() -> None:
    """Convert, repack and re-quantise checkpoints of mixture-of-experts language models, at the disk's speed.

    SRC and DST are directories, repositories of the Hugging Face Hub (ORG/NAME or hf://ORG/NAME@REVISION) or objects of a
    store (s3://BUCKET/PREFIX, gs://…, az://…). A directory of that name goes before the Hub; hf:// is always the Hub.

    Shell completion: eval "$(_KCONVERT_COMPLETE=bash_source kconvert)" (or zsh_source, fish_source).
    """


COMMANDS = (
    inspect.inspect,
    conversions.int4_to_bf16,
    conversions.int4_to_fp8,
    conversions.fp8_to_bf16,
    conversions.bf16_to_int4,
    conversions.fp8_to_int4,
    conversions.convert,
    repack.repack_amx,
    finalize.finalize,
    launch.launch,
    verify.verify,
    check.check,
    diff.diff,
    sample.sample,
    smoke.smoke,
    qat.qat,
)
for command in COMMANDS:
    main.add_command(command)
