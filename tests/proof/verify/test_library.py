"""compressed-tensors has its word in a process of its own, which loads it without transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("compressed_tensors", "transformers", "accelerate")
# Every byte of codes has another value by the quick way.
WRONG = """
from kconvert.proof.parity.quick import int4
sound = int4.DECODE
int4.DECODE = lambda words, *rest: sound(words ^ 1, *rest)
"""
LOADED = """
import sys
from kconvert.proof.parity import library
from kconvert.proof.processes import Crew
class Job:
    def loaded(self, number):
        if number:
            library.load()
        names = ("compressed_tensors.compressors", "accelerate", "transformers.dependency_versions_check")
        return [name in sys.modules for name in names]
with Crew(1, Job()) as crew:
    print([crew.ask("loaded", number).result() for number in range(2)])
"""


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A fresh process, as a command is."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def verify(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, after `script`, and what is loaded then."""
    command = "import sys\nfrom kconvert.cli import main\ntry:\n    main()\nfinally:\n    "
    loaded = f"print([name for name in {HEAVY} if name in sys.modules])\n"
    return python(f"{script}\n{command}{loaded}", "verify", *arguments)


def test_a_command_waits_for_neither_library(int4: Path, bf16: Path) -> None:
    done = verify("", int4, bf16)
    assert (done.returncode, done.stdout.splitlines()[1]) == (0, "[]"), done.stderr
    assert "decompressed by the proof's own code and checked by compressed-tensors" in done.stdout


@pytest.mark.parametrize("target", ["int8", "nvfp4"])
def test_what_only_the_library_decodes_is_decoded_by_it_all_the_same(int4: Path, tmp_path: Path, target: str) -> None:
    from kconvert import Recipe, convert, plan

    convert(plan(int4, Recipe(target)), tmp_path / "out")
    done = verify("", int4, tmp_path / "out")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_it_is_asked_of_every_weight(int4: Path, bf16: Path, bf16_copy: Path, raw: Any) -> None:
    """It decides where the quick way is wrong, for the better and for the worse."""
    assert verify(WRONG, int4, bf16).returncode == 0
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    checkpoint = raw.load(bf16_copy)
    checkpoint[name].data = checkpoint[name].data[:-1] + bytes([checkpoint[name].data[-1] ^ 1])
    checkpoint.save()
    done = verify(WRONG, int4, bf16_copy)
    assert done.returncode == 1
    assert f"'{name}' differs at [127, 255]" in done.stderr


@pytest.mark.parametrize("script", ["", WRONG], ids=["the quick way is right", "it is wrong"])
def test_the_worst_elements_are_shown_as_it_decodes_them(
    int4: Path, fp8: Path, tmp_path: Path, script: str, run_verify: Callable[..., Any]
) -> None:
    """From a process of its own as from here, where it is loaded."""
    import json

    reports = tmp_path / "apart.json", tmp_path / "here.json"
    assert verify(script, int4, fp8, "--report", reports[0]).returncode == 0
    assert run_verify(int4, fp8, "--report", reports[1]).exit_code == 0
    apart, here = (json.loads(path.read_text()) for path in reports)
    assert apart["worst"]
    assert apart["worst"] == here["worst"]


def test_transformers_does_not_come_along_where_a_process_does_nothing_else() -> None:
    done = python(LOADED)
    assert done.stdout == "[[False, False, False], [True, False, False]]\n", done.stderr


def test_transformers_comes_along_where_the_library_does_not_load_without_it() -> None:
    broken = "import sys\nfrom kconvert.proof.parity import library\nlibrary._Placeholder.__getattr__ = None\n"
    done = python(broken + LOADED)
    assert done.stdout == "[[False, False, False], [True, True, True]]\n", done.stderr
