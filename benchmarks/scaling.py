"""What many workers cost: ranks on cores of their own, Ray beside threads, and what it takes to share 10,000 shards.

Ranks have a core each, of which there may be fewer than ranks; let --dir be a tmpfs, as no second process makes a disk faster.
The driver of 256 workers is the true one, and their tasks are done by one process after the other, as theirs would: each opens
DST, finds out what is its own, writes shards of a few kB and records them. What all of that costs beyond one process without
workers is coordination.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

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
SIMULATED = 256
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
        small, large = (true_experts(options.dir, gb) for gb in (options.gb / 4, options.gb))
        compare_ranks(options.dir, small, large, options.runs)
    if "ray" in parts:
        source = true_experts(options.dir, options.gb)
        print(run([sys.executable, __file__, "--ray", options.dir, source, str(options.runs)]).stdout)
    print(f"load average after: {os.getloadavg()[0]:.1f}")
    machine(options.dir)


def compare_ranks(folder: Path, small: Path, large: Path, runs: int) -> None:
    """Bytes a second of n ranks, each pinned to a core, beside those of one.

    Of a model and of its fourth: what both have in common, as kernels that are loaded, is start, and not of the difference.
    """
    cores = sorted(os.sched_getaffinity(0))
    seconds: dict[int, list[float]] = {count: [] for count in WORKERS}
    starts: dict[int, list[float]] = {count: [] for count in WORKERS}
    for _ in range(runs):
        for count in WORKERS:
            little, fewer = slowest(small, folder / "scaling", count, cores)
            much, more = slowest(large, folder / "scaling", count, cores)
            seconds[count].append(much - little)
            starts[count].append(little - (much - little) * fewer / (more - fewer))
    alone = median(seconds[1])
    rows = []
    for count, times in seconds.items():
        times_faster = alone / median(times)
        usable = min(count, len(cores))
        goal = verdict(times_faster, 0.9 * usable, "x", at_most=False)
        together = f"{(more - fewer) / median(times) / GB:.2f} GB/s"
        rows.append(
            [str(count), spread(times, 2, "s"), together, f"{times_faster:.2f} x", spread(starts[count], 2, "s")]
        )
        print(
            f"{count} ranks: {times_faster:.2f} x one  {goal}  by the model {alone / usable:.2f} s, here {median(times):.2f} s"
        )
    table(["ranks", "slowest rank, start excluded", "together", "speed", "start"], rows)


def slowest(source: Path, target: Path, count: int, cores: list[int]) -> tuple[float, int]:
    """Seconds of the rank that took longest, of all at once, and the bytes that they wrote; leaves nothing."""
    remove(target)
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
    written = nbytes(tensor_files(target))
    remove(target)
    return max(float(json.loads(text)["seconds"]) for text in said), written


def coordinate(folder: Path) -> None:
    """In a process of its own, which is the driver."""
    import kconvert
    from kconvert.cluster import conversion
    from kconvert.planning.plan import repeatable
    from kconvert.targets.sample import SampleRecipe, plan_synthetic

    recipe = SampleRecipe("kimi-k2-thinking", {**SIZES, **RANKS}, 4000, False, 0)
    plan, target = repeatable(plan_synthetic(recipe), plan_synthetic, recipe), folder / "coordination"
    plan.hash  # noqa: B018  once in each process
    remove(target)
    alone = in_child(lambda: kconvert.convert(plan, target, threads=7))
    remove(target)
    conversion.Cluster, conversion.TASK = Simulated, 1  # type: ignore[misc, assignment]  as many tasks as a large one has
    tracemalloc.start()
    driver, workers = time.process_time(), cpu_of_children()
    kconvert.convert(plan, target, engine="ray", threads=7)
    driver, workers = time.process_time() - driver, cpu_of_children() - workers - Simulated.planning
    grown, shards = tracemalloc.get_traced_memory()[1] / 1e6, len(plan.shards)
    remove(target)
    cost = 1e3 * (driver + workers - alone) / shards
    print(
        f"{shards:,} shards, {Simulated.tasks:,} tasks of {SIMULATED} workers, CPU time: one process {alone:.1f} s, all"
    )
    print(
        f"workers {workers:.1f} s, the driver {driver:.1f} s: coordination {cost:.2f} ms a shard  {verdict(cost, 5, 'ms')}"
    )
    print(f"a driver's memory beside the plan: {grown / shards * 1000:.2f} MB per 1,000 shards", end="  ")
    print(verdict(grown / shards * 1000, 1, "MB"))


class Simulated:
    """In the place of cluster.ray.Cluster: the tasks of 256 workers, each done by one process that is like theirs."""

    tasks, planning = 0, 0.0

    def __init__(self, address: str | None) -> None:
        self.slots, self.cpus = SIMULATED, 1

    def call(
        self, work: Callable[..., object], numbers: Iterable[int], tell: Callable[[int], None]
    ) -> Iterator[tuple[int, object]]:
        with get_context("fork").Pool(1, begin, (work,)) as pool:
            Simulated.planning = pool.apply(plan_again)
            for number, told, value in pool.imap(perform, numbers):
                Simulated.tasks += 1
                tell(told)
                yield number, value
            pool.close()
            pool.join()

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: object) -> None:
        pass


AT_WORK: list[Any] = []  # of a worker


def begin(work: object) -> None:
    tracemalloc.stop()
    AT_WORK.append(work)


def plan_again() -> float:
    """CPU seconds that a worker takes for what each does once."""
    before = time.process_time()
    AT_WORK[0]._plan.hash  # noqa: B018
    return time.process_time() - before


def perform(number: int) -> tuple[int, int, object]:
    told: list[int] = []
    value = AT_WORK[0](number, told.append)
    return number, sum(told), value


def in_child(work: Callable[[], object]) -> float:
    """CPU seconds of `work` in a fork."""
    before = cpu_of_children()
    child = get_context("fork").Process(target=work)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit("a conversion failed")
    return cpu_of_children() - before


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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
