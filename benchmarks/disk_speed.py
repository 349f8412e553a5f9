"""A conversion against the disk itself: two dd's side by side, one reads the input, the other writes as many bytes.

All pass the page cache and find the source cold. kconvert's time is that of a fresh process, up to the last fsync; dd's
has no fsync. Each ratio is that of a pair of neighbouring runs. With `--scales mse` the same conversion by amax runs besides.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from statistics import median

from common import (
    GB,
    KCONVERT,
    Child,
    alternate,
    arguments,
    convert_cold,
    machine,
    make_cold,
    nbytes,
    remove,
    run,
    spread,
    table,
    tensor_files,
    true_experts,
    verdict,
)

TARGET = 1.15
TARGETS = {"int4-to-gguf": 1.05, "int4-to-mlx": 1.05, "mxfp4-to-nvfp4": 1.1}  # which keep codes
JOBS = (
    "int4-to-bf16",
    "int4-to-fp8",
    "int4-to-gguf",
    "int4-to-mlx",
    "int4-to-amxint4",
    "int4-to-amxint8",
    "fp8-to-bf16",
    "bf16-to-int4",
    "fp8-to-int4",
    "mxfp4-to-bf16",
    "mxfp4-to-fp8",
    "mxfp4-to-nvfp4",
    "gptq-to-bf16",
    "awq-to-bf16",
    "nvfp4-to-bf16",
)
FOREIGN = ("gptq", "awq", "nvfp4")  # which kconvert does not write


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model-gb", type=float, default=8.5, help="size of the model in BF16 [8.5]")
    parser.add_argument("--job", choices=JOBS, default="int4-to-bf16", help="the command measured [int4-to-bf16]")
    parser.add_argument("--scales", choices=["amax", "mse"], help="by this rule [the command's default]")
    options = parser.parse_args()
    source = source_of(options.job, true_experts(options.dir, options.model_gb))
    converted, zeros = options.dir / "disk-converted", options.dir / "disk-zeros"

    def convert(scales: str | None = options.scales) -> Child:
        terms = ["-q", *([f"--scales={scales}"] if scales else [])]
        result, written = convert_cold([*command(options.job, source, converted), *terms], source, converted)
        sizes.append(written)
        return result

    def disk() -> Child:
        make_cold(source)
        result = run(["sh", "-c", two_dds(tensor_files(source), zeros, sizes[-1])])
        remove(zeros)
        return result

    sizes: list[int] = []
    remove(converted)
    sides: dict[str, Callable[[], Child]] = {"kconvert": convert, "two dd's": disk}
    if options.scales == "mse":
        sides["kconvert by amax"] = lambda: convert("amax")
    results = alternate(options.runs, sides)
    read, written = nbytes(tensor_files(source)), sizes[-1]
    rows = [
        [
            name,
            spread([child.seconds for child in children], 2, "s"),
            spread([written / child.seconds / GB for child in children], 2, "GB/s"),
            spread([(read + written) / child.seconds / GB for child in children], 2, "GB/s"),
            spread([child.cpu for child in children], 2, "s"),
        ]
        for name, children in results.items()
    ]
    print(f"\nread {read / GB:.2f} GB, wrote {written / GB:.2f} GB, {options.runs} runs each: median (min-max)", end="")
    table(["", "wall time", "written", "read and written", "CPU time"], rows)
    ratios = [ours.seconds / dd.seconds for ours, dd in zip(results["kconvert"], results["two dd's"], strict=True)]
    print(f"peak RSS: {spread([child.peak / 1e6 for child in results['kconvert']], 0, 'MB')}")
    print(
        f"kconvert / two dd's, pair by pair: {spread(ratios)}  {verdict(median(ratios), TARGETS.get(options.job, TARGET))}"
    )
    if options.scales == "mse":
        for what, of in {"time": attrgetter("seconds"), "CPU time": attrgetter("cpu")}.items():
            pairs = zip(results["kconvert"], results["kconvert by amax"], strict=True)
            print(f"{what} by mse / by amax, pair by pair: {spread([of(mse) / of(amax) for mse, amax in pairs])}")
    machine(options.dir)


def source_of(job: str, int4: Path) -> Path:
    """The checkpoint in the encoding that the job starts from."""
    encoding = job.partition("-")[0]
    if encoding == "int4":
        return int4
    source = int4.with_name(f"{int4.name}-{encoding}")
    if encoding in FOREIGN and not source.exists():
        run([sys.executable, Path(__file__).with_name("foreign_sample.py"), int4, source, encoding])
    elif not (source / "config.json").exists():
        run([*command(f"int4-to-{encoding}", int4, source), "-q"])
    return source


def command(job: str, source: Path, target: Path) -> list[str | Path]:
    """Of the pairs that have no command of their own, too."""
    if "amx" in job:
        return [KCONVERT, "repack-amx", source, target, f"--method={job.rpartition('-')[2].upper()}", "--numa=2"]
    if any(encoding in job for encoding in ("mxfp4", "gguf", "mlx", *FOREIGN)):
        return [KCONVERT, "convert", source, target, "--to", job.rpartition("-")[2]]
    return [KCONVERT, job, source, target]


def two_dds(sources: list[Path], target: Path, size: int) -> str:
    """A shell line: read all of `sources` and write `size` zeros to `target`, at once."""
    reads = " && ".join(f"dd if={shlex.quote(str(file))} of=/dev/null iflag=direct bs=8M" for file in sources)
    write = f"dd if=/dev/zero of={shlex.quote(str(target))} oflag=direct bs=8M count={size} iflag=count_bytes"
    return f"({reads}) & {write} && wait $!"


if __name__ == "__main__":
    main()
