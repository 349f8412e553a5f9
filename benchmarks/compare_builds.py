"""Two builds of kconvert do the same work, and every output is compared: tensors bit for bit, texts, reports, refusals.

    python benchmarks/compare_builds.py BEFORE AFTER [--dir DIR] [--like NAME ...] [--expect FILE]

BEFORE and AFTER are each an interpreter that has kconvert, or the PYTHONPATH of a build for the interpreter at hand. A small
sample of every manifest goes through every command. What differs is listed, and the exit code is 1 if anything does that is
not expected. The version, and what a run says of time, memory and free disk, do not count.

A line of FILE is a cause, a tab, and a regular expression; differences that it finds are counted under their cause.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

# The arguments of a command; directories are relative, so that both builds are told the same.
Job: TypeAlias = list[str]
Causes: TypeAlias = Mapping[str, str]  # regular expression -> cause

MANIFESTS = (
    "deepseek-v3",
    "glm-4-moe",
    "gpt-oss",
    "kimi-k2-instruct",
    "kimi-k2-thinking",
    "kimi-k2.5",
    "kimi-k2.6",
    "kimi-linear",
    "mixtral",
    "qwen3-moe",
)
TARGETS = {
    "bf16": ["--to", "bf16"],
    "f16": ["--to", "f16"],
    "fp8": ["--to", "fp8"],
    "fp8-mse": ["--to", "fp8", "--scales", "mse"],
    "fp8-all": ["--to", "fp8", "--layout", "all"],
    "fp8-block": ["--to", "fp8", "--layout", "compressed-tensors"],
    "fp8-channel": ["--to", "fp8", "--layout", "compressed-tensors-channel"],
    "int4": ["--to", "int4"],
    "int4-mse": ["--to", "int4", "--scales", "mse"],
    "int4-64": ["--to", "int4", "--convention", "compressed-tensors", "--group-size", "64"],
    "int8": ["--to", "int8"],
    "int8-all": ["--to", "int8", "--layout", "all"],
    "mxfp4": ["--to", "mxfp4"],
    "mxfp4-mse": ["--to", "mxfp4", "--scales", "mse"],
    "mxfp4-all": ["--to", "mxfp4", "--layout", "all"],
    "mxfp8": ["--to", "mxfp8"],
    "mxfp8-all": ["--to", "mxfp8", "--layout", "all"],
}
NAMED = (  # a source by what it was made of, and what follows
    ("src", "int4-to-bf16"),
    ("src", "int4-to-fp8"),
    ("src", "fp8-to-bf16"),
    ("src", "fp8-to-int4"),
    ("bf16", "bf16-to-int4"),
    ("fp8", "fp8-to-bf16"),
    ("fp8", "fp8-to-int4"),
)
PACKED = {
    "amxint4": ["--method", "AMXINT4", "--numa", "2"],
    "amxint4-amax": ["--method", "AMXINT4", "--numa", "1", "--scales", "amax", "--format", "kt"],
    "amxint8": ["--method", "AMXINT8", "--numa", "1", "--with-rest"],
    "amxint8-mse": ["--method", "AMXINT8", "--numa", "2", "--scales", "mse"],
}
SIZES = {"layers": 3, "experts": 4, "hidden": 256, "moe-intermediate": 256, "vocab": 256, "heads": 4}
MORE_SIZES = {"dense-layers": 1, "intermediate": 512, "q-rank": 64, "kv-rank": 32}  # which not every family has
THOROUGH = ("kimi-k2-thinking", "gpt-oss", "deepseek-v3")  # whose outputs are all verified, and converted back
VOLATILE = {
    "kconvert",
    "plan",
    "seconds",
    "bytes_per_second",
    "peak_memory_bytes",
    "free_disk_bytes",
    "written_by",
    "bound_by",
}

CHILD = """
import contextlib, io, json, sys
from kconvert.cli import main
for line in sys.stdin:
    sys.argv = ["kconvert", *json.loads(line)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(standalone_mode=False)
        except SystemExit as stop:
            code = stop.code or 0
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@dataclass(frozen=True)
class Build:
    """An installed version, and the directory in which it works."""

    interpreter: str
    path: str | None
    work: Path

    @classmethod
    def at(cls, place: str, work: Path) -> Build:
        if Path(place).is_file():
            return cls(place, None, work)
        return cls(sys.executable, place, work)

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """[exit code, stdout, stderr] of each job, one after the other in one process."""
        self.work.mkdir(parents=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        if self.path is not None:
            environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, self.path.split(os.pathsep)))
        done = subprocess.run(
            [self.interpreter, "-c", CHILD],
            input="".join(json.dumps(job) + "\n" for job in jobs),
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.work,
            env=environment,
            check=True,
        )
        own = str(self.work.resolve())
        return [[_plain(text, own) for text in json.loads(line)] for line in done.stdout.splitlines()]


def _plain(said: Any, own: str) -> Any:
    """What a command said, without what no two runs have in common."""
    if not isinstance(said, str):
        return said
    text = said.replace(own, ".")
    try:
        return _lasting(json.loads(text))
    except ValueError:
        return text


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(entry) for key, entry in value.items() if key not in VOLATILE}
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value


def jobs_for(name: str) -> Iterator[Job]:
    """The whole way of a sample: made, looked at, converted, packed, cut, compared."""
    sizes = {**SIZES, **(MORE_SIZES if name.startswith(("kimi-k2", "deepseek")) else {})}
    options = [text for dimension, size in sizes.items() for text in (f"--{dimension}", str(size))]
    yield ["sample", "src", "--like", name, *options, "-q"]
    yield ["sample", "scattered", "--like", name, *options, "--shard-size", "300KB", "--scatter", "--seed", "1", "-q"]
    yield ["sample", "cut", "--from", "src", "--layers", "2", "--experts", "2", "-q"]
    yield ["inspect", "src", "--json"]
    yield ["convert", "src", "nowhere", "--to", "bf16", "--dry-run", "--json"]
    thorough = name in THOROUGH
    for output, target in TARGETS.items():
        yield ["convert", "src", output, *target, "--shard-size", "1MB", "--json"]
        yield ["inspect", output, "--json"]
        if thorough or output in ("bf16", "int4"):
            yield ["verify", "src", output, "--json"]
        if thorough:
            yield ["convert", output, f"{output}-back", "--to", "bf16", "--json"]
    for source, command in NAMED:
        yield [command, source, f"{source}-{command}", "--json"]
    yield ["diff", "src", "bf16", "--json"]
    yield ["diff", "src", "bf16-bf16-to-int4", "--json"]
    for output, method in PACKED.items():
        yield ["repack-amx", "src", output, *method, "--json"]
        yield ["inspect", output, "--json"]
        yield ["verify", "src", output, "--json"]
    yield ["repack-amx", "--from-amx", "amxint8", "resplit", "--numa", "2", "--json"]
    yield ["verify", "src", "resplit", "--json"]


def contents(root: Path) -> dict[str, Any]:
    """Everything below `root` by relative path, but for journals; a tensor as FILE:NAME."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if ".kconvert/" in name:
            continue
        data = path.read_bytes()
        if name.endswith(".safetensors"):
            found.update((f"{name}:{tensor}", said) for tensor, said in _tensors(data))
        elif name.endswith(".json"):
            found[name] = _lasting(json.loads(data))
        else:
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def _tensors(data: bytes) -> Iterator[tuple[str, Any]]:
    (length,) = struct.unpack("<Q", data[:8])
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            yield name, _lasting(info)
            continue
        start, stop = (8 + length + offset for offset in info["data_offsets"])
        yield name, [info["dtype"], info["shape"], start, hashlib.sha256(data[start:stop]).hexdigest()]


def differences(ours: Any, theirs: Any, place: str) -> Iterator[str]:
    """A line for each leaf that differs."""
    if ours == theirs:
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from differences(ours.get(key), theirs.get(key), f"{place} {key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{place} [{number}]")
    else:
        yield f"{place}: {_short(ours)} before, {_short(theirs)} after"


def compare(name: str, before: Build, after: Build, causes: Causes) -> tuple[str, list[str], Counter[str]]:
    """A line of the table, what differs, and how much of what was expected does by each cause."""
    jobs = list(jobs_for(name))
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda build: build.run(jobs), (before, after))
    found: list[str] = []
    for job, *outcomes in zip(jobs, one, two, strict=True):
        said = ({"exit code": code, "stdout": out, "stderr": err} for code, out, err in outcomes)
        found += differences(*said, f"kconvert {' '.join(job)}:")
    ours, theirs = contents(before.work), contents(after.work)
    found += differences(ours, theirs, "file")
    expected = Counter(cause for line in found if (cause := _cause(line, causes)))
    faults = [line for line in found if not _cause(line, causes)]
    done = sum(outcome[0] == 0 for outcome in one)
    tensors = sum(":" in path for path in ours)
    line = f"{name:<20}{done:>6}{len(jobs) - done:>9}{len(ours) - tensors:>8}{tensors:>9}{expected.total():>10}{len(faults):>8}"
    return line, [f"{name}: {fault}" for fault in faults], expected


def _cause(line: str, causes: Causes) -> str | None:
    return next((cause for pattern, cause in causes.items() if re.search(pattern, line)), None)


def read_causes(path: Path | None) -> Causes:
    lines = path.read_text("utf-8").splitlines() if path else ()
    return {pattern: cause for cause, _, pattern in (line.partition("\t") for line in lines)}


def _short(outcome: Any) -> str:
    return json.dumps(outcome)[:400]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="an interpreter, or a PYTHONPATH")
    parser.add_argument("after", help="an interpreter, or a PYTHONPATH")
    parser.add_argument("--dir", type=Path, help="where the outputs go [default: a temporary directory]")
    parser.add_argument("--like", nargs="*", default=MANIFESTS, choices=MANIFESTS, help="only these manifests")
    parser.add_argument("--expect", type=Path, metavar="FILE", help="differences that are meant, with their causes")
    options = parser.parse_args()
    causes = read_causes(options.expect)
    faults: list[str] = []
    expected: Counter[str] = Counter()
    print(f"{'sample':<20}{'done':>6}{'refused':>9}{'files':>8}{'tensors':>9}{'expected':>10}{'differ':>8}")
    for name in options.like:
        with tempfile.TemporaryDirectory(dir=options.dir) as work:
            builds = (Build.at(options.before, Path(work, "before")), Build.at(options.after, Path(work, "after")))
            line, found, meant = compare(name, *builds, causes)
        faults += found
        expected += meant
        print(line, flush=True)
    print(*(f"{count} differences: {cause}" for cause, count in expected.most_common()), *faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
