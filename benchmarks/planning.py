"""Planning a whole model: Kimi-K2-Thinking (62 shards, 1.03 trillion parameters, 207,360 packed names, 594 GB) or Kimi-K3 (some
95 shards, 2.8 trillion parameters, 497,220 names, 1.56 TB).

The files are sparse: their headers are true, their data are holes, so they take some 40 MB of disk. `--dry-run` prints its
plan and then refuses, as it should, because the 2 TB of output do not fit; its exit code 2 is no failure here.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from common import KCONVERT, Child, alternate, arguments, figures, machine, make_cold, run, table, verdict

TARGET_MB = 500
TARGETS = {"kimi-k2-thinking": (3, 3), "kimi-k3": (8, 5)}  # seconds to plan and to inspect
SHARD_SIZES = {"kimi-k2-thinking": 9_700_000_000, "kimi-k3": 16_990_000_000}  # about as many as are published


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--like", choices=TARGETS, default="kimi-k2-thinking", help="the model [kimi-k2-thinking]")
    options = parser.parse_args()
    source, target = holes(options.dir / f"planning-{options.like}", options.like), options.dir / "planning-bf16"

    def dry_run() -> Child:
        make_cold(source)
        return run([KCONVERT, "convert", source, target, "--to", "bf16", "--dry-run", "--json"], allowed=(0, 2))

    def inspect() -> Child:
        make_cold(source)
        return run([KCONVERT, "inspect", source, "--json"])

    results = alternate(options.runs, {"--to bf16 --dry-run": dry_run, "inspect": inspect})
    plan, summary = (json.loads(children[0].stdout) for children in results.values())
    packed = sum(row["tensors"] for row in summary["roles"] if row["format"].startswith(("int4", "mxfp4")))
    print(
        f"\n{summary['shards']} shards, {summary['tensors']:,} tensors ({packed:,} of them packed experts), "
        f"{summary['parameters']:,} parameters, {summary['bytes'] / 1e9:,.2f} GB in, "
        f"{plan['output_bytes'] / 1e9:,.2f} GB out"
    )
    rows = [[name, *figures(children, 2)] for name, children in results.items()]
    table(["", "wall time", "CPU time", "peak RSS"], rows)
    for (name, children), target_seconds in zip(results.items(), TARGETS[options.like], strict=True):
        seconds, peak = median(child.seconds for child in children), median(child.peak / 1e6 for child in children)
        print(f"{name}: {verdict(seconds, target_seconds, 's')} {verdict(peak, TARGET_MB, 'MB')}")
    if refusal := next(iter(results.values()))[0].stderr.strip():
        print(f"--dry-run refused, as expected: {refusal}")
    machine(options.dir)


def holes(folder: Path, like: str) -> Path:
    """`folder`, with such a checkpoint in it, kept for the next time."""
    if not (folder / "config.json").exists():
        print(f"making {folder} …", flush=True)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its memory must not count as the children's
            pool.submit(write_holes, folder, like).result()
    return folder


def write_holes(folder: Path, like: str) -> None:
    """The whole checkpoint with true headers, index, config and side files, and holes for data."""
    from kconvert.targets.sample import SampleRecipe, plan_synthetic

    plan = plan_synthetic(SampleRecipe(like, shard_size=SHARD_SIZES[like]))
    for shard in plan.shards:
        path = folder / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    for name, text in sorted(plan.texts.items(), key=lambda item: item[0] == "config.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(text))


if __name__ == "__main__":
    main()
