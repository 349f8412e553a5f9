"""Planning the whole Kimi-K2-Thinking: 62 shards, 1.03 trillion parameters, 207,360 packed names, 594 GB.

The files are sparse: their headers are true, their data are holes, so they take some 40 MB of disk. `--dry-run` prints its
plan and then refuses, as it should, because the 2 TB of output do not fit; its exit code 2 is no failure here.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from common import KCONVERT, Child, alternate, arguments, machine, make_cold, run, spread, table, verdict

TARGET_SECONDS, TARGET_MB = 10, 1000
SHARD_SIZE = 9_700_000_000  # gives the 62 shards of the published checkpoint


def main() -> None:
    options = arguments(__doc__).parse_args()
    source, target = options.dir / "planning-k2", options.dir / "planning-bf16"
    if not (source / "config.json").exists():
        print(f"making {source} …", flush=True)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its memory must not count as the children's
            pool.submit(write_holes, source).result()

    def dry_run() -> Child:
        make_cold(source)
        return run([KCONVERT, "int4-to-bf16", source, target, "--dry-run", "--json"], allowed=(0, 2))

    def inspect() -> Child:
        make_cold(source)
        return run([KCONVERT, "inspect", source, "--json"])

    results = alternate(options.runs, {"int4-to-bf16 --dry-run": dry_run, "inspect": inspect})
    plan, summary = (json.loads(children[0].stdout) for children in results.values())
    packed = sum(row["tensors"] for row in summary["roles"] if row["format"].startswith("int4"))
    print(
        f"\n{summary['shards']} shards, {summary['tensors']:,} tensors ({packed:,} of them packed experts), "
        f"{summary['parameters']:,} parameters, {summary['bytes'] / 1e9:,.2f} GB in, "
        f"{plan['output_bytes'] / 1e9:,.2f} GB out"
    )
    rows = [
        [
            name,
            spread([child.seconds for child in children], 2, "s"),
            spread([child.cpu for child in children], 2, "s"),
            spread([child.peak / 1e6 for child in children], 0, "MB"),
        ]
        for name, children in results.items()
    ]
    table(["", "wall time", "CPU time", "peak RSS"], rows)
    for name, children in results.items():
        seconds, peak = median(child.seconds for child in children), median(child.peak / 1e6 for child in children)
        print(f"{name}: {verdict(seconds, TARGET_SECONDS, 's')} {verdict(peak, TARGET_MB, 'MB')}")
    if refusal := next(iter(results.values()))[0].stderr.strip():
        print(f"--dry-run refused, as expected: {refusal}")
    machine(options.dir)


def write_holes(folder: Path) -> None:
    """The whole checkpoint with true headers, index, config and side files, and holes for data."""
    from kconvert.targets.sample import SampleRecipe, plan_synthetic

    plan = plan_synthetic(SampleRecipe(shard_size=SHARD_SIZE))
    for shard in plan.shards:
        path = folder / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    for name, text in sorted(plan.texts.items(), key=lambda item: item[0] == "config.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


if __name__ == "__main__":
    main()
