"""What the benchmarks share: children with their time and peak memory, cold files, alternating runs, a table.

The scripts themselves import neither numpy nor torch: Linux counts the memory of the parent at the moment of the fork as
the child's, so a big parent would spoil the child's peak. Modules are compiled once, as pip does when it installs.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

KCONVERT = str(Path(sysconfig.get_path("scripts"), "kconvert"))
GB = 1e9
EXPERT_BYTES = 3 * 2048 * 7168 * 2  # of a true one, in BF16
# The rest of the model small, so that nearly every byte is one that needs converting.
SMALL = {"layers": 2, "dense-layers": 1, "heads": 4, "q-rank": 64, "kv-rank": 64, "intermediate": 512, "vocab": 1024}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
LITTLE_ELSE = [f"--{name}={size}" for name, size in SMALL.items()]


@dataclass(frozen=True)
class Child:
    """A finished process: wall time from before its start, time on the CPUs, peak resident bytes, what it said."""

    seconds: float
    cpu: float
    peak: int
    stdout: str
    stderr: str


def arguments(doc: str | None, runs: int = 5) -> argparse.ArgumentParser:
    """--dir and --runs, which every benchmark that writes files has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir(), "kconvert-benchmarks")
    parser.add_argument("--dir", type=Path, default=default, help=f"on the disk to measure [{default}]")
    parser.add_argument("--runs", type=int, default=runs, help=f"of each side [{runs}]")
    return parser


def run(command: Sequence[str | Path], allowed: Sequence[int] = (0,)) -> Child:
    """Run `command` in a fresh process; ends the benchmark with the child's words when it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        child = subprocess.Popen([*map(str, command)], stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if child.returncode not in allowed:
        sys.exit(f"{' '.join(map(str, command))}\nended with {child.returncode}:\n{stderr[-2000:]}")
    return Child(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, stdout, stderr)


def convert_cold(command: Sequence[str | Path], source: Path, target: Path) -> tuple[Child, int]:
    """A conversion of `source`, whose files are cold, to `target`, which is removed; and how many bytes of tensors it had."""
    make_cold(source)
    result = run(command)
    written = nbytes(tensor_files(target))
    remove(target)
    return result, written


def peak_together(command: Sequence[str | Path]) -> int:
    """Bytes that `command` and all processes that it starts have at most at once, each page counted once, looked at ten times
    a second."""
    child = subprocess.Popen([*map(str, command)])
    peak = 0
    while child.poll() is None:
        peak = max(peak, sum(map(_proportional, _descendants(child.pid))))
        time.sleep(0.1)
    if child.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {child.returncode}")
    return peak


def _descendants(process: int) -> Iterator[int]:
    yield process
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in thread.read_text().split():
                yield from _descendants(int(child))


def _proportional(process: int) -> int:
    """Bytes of a process; of pages that n processes share, an n-th."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def sample(folder: Path, name: str, *options: str) -> Path:
    """A checkpoint made by `kconvert sample`, kept for the next time; its name must tell the options."""
    target = folder / name
    if not (target / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {target} …", flush=True)
        run([KCONVERT, "sample", target, "-q", "--overwrite", *options])
    return target


def true_experts(folder: Path, model_gb: float) -> Path:
    """The INT4 checkpoint of a model of about so many GB in BF16: two layers, and as many of Kimi-K2's experts as that is."""
    experts = max(1, round(model_gb * GB / EXPERT_BYTES))
    return sample(folder, f"disk-{experts}-experts", *LITTLE_ELSE, f"--experts={experts}")


def tensor_files(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.iterdir() if file.suffix in (".safetensors", ".gguf"))


def nbytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def make_cold(*folders: Path) -> None:
    """Let the disk finish what it has to write, and take the files out of the page cache."""
    os.sync()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remove(path: Path) -> None:
    """A file or a directory, present or not; the disk has forgotten it when this returns."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()


def alternate(runs: int, sides: Mapping[str, Callable[[], Child]]) -> dict[str, list[Child]]:
    """A B A B …: what disturbs the machine meets both sides alike."""
    results: dict[str, list[Child]] = {name: [] for name in sides}
    for number in range(1, runs + 1):
        for name, side in sides.items():
            result = side()
            results[name].append(result)
            peak = f"peak {result.peak / 1e6:.0f} MB"
            print(f"  run {number}/{runs}  {name}: {result.seconds:.2f} s, CPU {result.cpu:.2f} s, {peak}", flush=True)
    return results


def spread(values: Iterable[float], digits: int = 2, unit: str = "") -> str:
    """Median and range: '1.20 s (1.11-1.42)'."""
    ordered = sorted(values)
    low, high = f"{ordered[0]:.{digits}f}", f"{ordered[-1]:.{digits}f}"
    return f"{median(ordered):.{digits}f}{unit and ' ' + unit} ({low}-{high})"


def verdict(value: float, target: float, unit: str = "", *, at_most: bool = True) -> str:
    """Whether a target is met, and by how much it is missed."""
    met = value <= target if at_most else value >= target
    goal = f"target {'<=' if at_most else '>='} {target:g} {unit}".rstrip()
    return f"[{goal}: " + ("met]" if met else f"missed by {abs(value / target - 1):.0%}]")


def figures(children: Sequence[Child], digits: int) -> list[str]:
    """Of a table: wall time and time on the CPUs with so many digits, peak RSS."""
    return [
        spread([child.seconds for child in children], digits, "s"),
        spread([child.cpu for child in children], digits, "s"),
        spread([child.peak / 1e6 for child in children], 0, "MB"),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    print()
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print()


def machine(folder: Path | None = None) -> None:
    """Print the one line that says where these figures come from."""
    model = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    facts = [f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB", f"Python {platform.python_version()}"]
    if folder is not None:
        answer = subprocess.run(["df", "--output=fstype,source", folder], capture_output=True, text=True, check=True)
        facts.append(" on ".join(answer.stdout.split()[2:]))
    print(f"machine: {', '.join(facts)}, Linux {platform.release()}")


@contextmanager
def serving(serve: Callable[[Path, float, Connection], None], source: Path, speed: float) -> Iterator[str]:
    """The endpoint of a server in a process of its own, which no side has to wait for; it sends that, and ends when told to."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(source, speed, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send("stop")
        process.join()
