"""What many workers cost: ranks on cores of their own, Ray beside threads, and what it takes to share 10,000 shards.

Ranks have a core each, of which there may be fewer than ranks; let --dir be a tmpfs, as no second process makes a disk faster.
The 256 workers are simulated one after the other: each opens DST, finds out what is its own, writes shards of a few kB and
records them; what a core takes for that beside the writing is the cost. The model of docs/CLUSTER.md says how long n ranks
should take.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median

from common import (
    GB,
    KCONVERT,
    arguments,
    machine,
    nbytes,
    remove,
    run,
    spread,
    table,
    tensor_files,
    true_experts,
    verdict,
)

WORKERS = (1, 2, 4)
SIMULATED, SHARDS, TASKS = 256, 10_000, 8  # tasks of each worker, as the Ray engine has them
SIZES = {"experts": 384, "hidden": 64, "moe_intermediate": 32, "intermediate": 64, "vocab": 64, "heads": 1}
RANKS = {"q_rank": 32, "kv_rank": 32, "dense_layers": 1, "layers": 26}


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--gb", type=float, default=3, help="of the model in BF16 [3]")
    parser.add_argument("--part", choices=("coordination", "ranks", "ray"), action="append", help="[all of them]")
    options = parser.parse_args()
    parts = options.part or ["coordination", "ranks", "ray"]
    print(f"load average before: {os.getloadavg()[0]:.1f}")
    if "coordination" in parts:
        print(run([sys.executable, __file__, "--coordinate", options.dir]).stdout)
    if "ranks" in parts:
        compare_ranks(options.dir, true_experts(options.dir, options.gb), options.runs)
    if "ray" in parts:
        source = true_experts(options.dir, options.gb)
        print(run([sys.executable, __file__, "--ray", options.dir, source, str(options.runs)]).stdout)
    print(f"load average after: {os.getloadavg()[0]:.1f}")
    machine(options.dir)


def compare_ranks(folder: Path, source: Path, runs: int) -> None:
    """Bytes a second of n ranks, each pinned to a core, beside those of one."""
    cores = sorted(os.sched_getaffinity(0))
    seconds: dict[int, list[float]] = {count: [] for count in WORKERS}
    for _ in range(runs):
        for count in WORKERS:
            target = folder / "scaling"
            remove(target)
            seconds[count].append(slowest(source, target, count, cores))
            written = nbytes(tensor_files(target))
            remove(target)
    alone = median(seconds[1])
    rows = []
    for count, times in seconds.items():
        times_faster = alone / median(times)
        usable = min(count, len(cores))
        goal = verdict(times_faster, 0.9 * usable, "x", at_most=False)
        rows.append(
            [str(count), spread(times, 2, "s"), f"{written / median(times) / GB:.2f} GB/s", f"{times_faster:.2f} x"]
        )
        print(
            f"{count} ranks: {times_faster:.2f} x one  {goal}  by the model {alone / usable:.2f} s, here {median(times):.2f} s"
        )
    table(["ranks", "slowest rank, start excluded", "together", "speed"], rows)


def slowest(source: Path, target: Path, count: int, cores: list[int]) -> float:
    """Seconds of the rank that took longest, of all at once."""
    children = []
    for index in range(count):
        core = cores[index % len(cores)]
        command = [KCONVERT, "int4-to-bf16", source, target, "--shard-size", "100MB", "--threads", "2", "--json"]
        children.append(
            subprocess.Popen(
                ["taskset", "-c", str(core), *map(str, command), "--worker", f"{index}/{count}"],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit("a rank failed")
    return max(float(json.loads(text)["seconds"]) for text in said)


def coordinate(folder: Path) -> None:
    """In a process of its own, which is each worker in turn, and then the driver."""
    from kconvert.run import job
    from kconvert.run.delivery import Delivery
    from kconvert.run.state.finalize import finalize_ranks
    from kconvert.run.state.ranks import Rank
    from kconvert.targets.sample import SampleRecipe, plan_synthetic

    plan = plan_synthetic(SampleRecipe("kimi-k2-thinking", {**SIZES, **RANKS}, 4000, False, 0))
    target, count = folder / "coordination", SIMULATED * TASKS
    remove(target)
    inside = [0.0]
    started = time.process_time()
    plan.hash  # noqa: B018  once in each process
    for number in range(count):
        terms = job.Terms(rank=Rank(number, count), surveyed=True)
        with job.prepared(plan, Delivery.to(target), terms, "benchmark", None) as work:  # type: ignore[arg-type]
            write(work, inside)
    spent = time.process_time() - started - inside[0]
    tracemalloc.start()
    closing = time.process_time()
    finalize_ranks(target)
    closing = time.process_time() - closing
    grown, shards = tracemalloc.get_traced_memory()[1], len(plan.shards)
    shutil.rmtree(target)
    milliseconds = 1e3 * (spent + closing) / shards
    print(
        f"{shards:,} shards, {count:,} tasks of {SIMULATED} workers: {milliseconds:.2f} ms of a core a shard", end="  "
    )
    print(verdict(milliseconds, 5, "ms"), f" closing {closing:.2f} s")
    print(
        f"a driver's memory beside the plan, when it closes DST: {grown / 1e6 / (shards / 1000):.2f} MB per 1,000 shards",
        end="  ",
    )
    print(verdict(grown / 1e6 / (shards / 1000), 1, "MB"))


def write(work: object, inside: list[float]) -> None:
    """The share of a task; what the engine takes for the bytes themselves is no coordination."""
    from kconvert.run.engine import Limits

    before = time.process_time()
    work.run(Limits.choose(1), lambda nbytes: None)  # type: ignore[attr-defined]
    inside[0] += time.process_time() - before
    work.finish()  # type: ignore[attr-defined]


def compare_ray(folder: Path, source: Path, runs: int) -> None:
    """Threads and the workers of a Ray of this machine in turn, in one process, whose first run of each is not counted."""
    import kconvert
    from kconvert.cluster.ray import Cluster

    plan = kconvert.plan(source, kconvert.Recipe("bf16", shard_size=100_000_000))
    seconds: dict[str, list[float]] = {"threads": [], "ray": []}
    with Cluster("local"):
        for _ in range(runs + 1):
            for engine, times in seconds.items():
                remove(folder / "scaling")
                times.append(timed(lambda engine=engine: kconvert.convert(plan, folder / "scaling", engine=engine)))
    remove(folder / "scaling")
    threads, ray = (median(times[1:]) for times in seconds.values())
    for engine, times in seconds.items():
        print(f"{engine}: {spread(times[1:], 2, 's')}")
    print(f"Ray on one node: {ray / threads:.3f} x threads  {verdict(ray / threads, 1.05, 'x')}")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    if sys.argv[1:2] == ["--coordinate"]:
        coordinate(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--ray"]:
        compare_ray(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
