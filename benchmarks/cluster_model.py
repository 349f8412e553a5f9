"""The model of time in docs/CLUSTER.md beside ranks whose lines and stores are as slow as it is told.

The Hub and the store are the tests', on 127.0.0.1 and in processes of their own. All ranks share one Hub that reads at so many
bytes a second, or have a line of that speed each, or send to one store that writes at that speed: so few that no core has
much to do. Or nothing is slow, and each rank has a core of its own; one alone has shown what that converts in a second. Let
--dir be a tmpfs, so that no disk is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from common import KCONVERT, arguments, machine, nbytes, remove, serving, table, tensor_files, true_experts

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "hub"), str(TESTS / "helpers")]
REPO, OUT = "moonshotai/Cut-K2", "s3://models/bf16"
COMMIT = "c" * 40
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}
WORKERS = (1, 2, 4)


def main() -> None:
    parser = arguments(__doc__, runs=1)
    parser.add_argument("--gb", type=float, default=0.7, help="of the model in BF16 [0.7]")
    parser.add_argument("--reads", type=float, default=30, help="MB/s of the Hub, or of each line to it [30]")
    parser.add_argument("--writes", type=float, default=60, help="MB/s of the store [60]")
    options = parser.parse_args()
    source = true_experts(options.dir, options.gb)
    folder, reads, writes = options.dir / "cluster-model", options.reads * 1e6, options.writes * 1e6
    size, made = nbytes(tensor_files(source)), [0]

    def local(count: int) -> float:
        seconds = together(count, source, folder / "out", folder)
        made[0] = nbytes(tensor_files(folder / "out"))
        return seconds

    def one_hub(count: int) -> float:
        with serving(hub, source, reads) as url:
            return together(count, REPO, folder / "out", folder, [{"HF_ENDPOINT": url}] * count)

    def own_lines(count: int) -> float:
        with ExitStack() as held:
            urls = [held.enter_context(serving(hub, source, reads)) for _ in range(count)]
            return together(count, REPO, folder / "out", folder, [{"HF_ENDPOINT": url} for url in urls])

    def one_store(count: int) -> float:
        with serving(store, source, writes) as url:
            return together(count, source, OUT, folder, [{"AWS_ENDPOINT_URL": url, **KEYS}] * count)

    print(f"load average before: {os.getloadavg()[0]:.1f}")
    core = local(1)
    cores = len(os.sched_getaffinity(0))
    cases: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
        "cores": (local, lambda n: core / min(n, cores)),
        f"one Hub, {options.reads:.0f} MB/s": (one_hub, lambda n: size / reads),
        f"lines of {options.reads:.0f} MB/s": (own_lines, lambda n: size / (n * reads)),
        f"one store, {options.writes:.0f} MB/s": (one_store, lambda n: made[0] / writes),
    }
    rows = []
    for name, (work, model) in cases.items():
        for count in WORKERS:
            measured = median(work(count) for _ in range(options.runs))
            said = max(model(count), core / min(count, cores))
            rows.append([name, str(count), f"{said:.1f} s", f"{measured:.1f} s", f"{measured / said:.2f}"])
    remove(folder)
    print(f"{size / 1e9:.2f} GB in, {made[0] / 1e9:.2f} GB out, one core {made[0] / core / 1e9:.2f} GB/s")
    table(["least is of", "ranks", "by the model", "measured", "ratio"], rows)
    print(f"load average after: {os.getloadavg()[0]:.1f}")
    machine(options.dir)


def together(
    count: int, source: str | Path, target: str | Path, folder: Path, variables: list[dict[str, str]] | None = None
) -> float:
    """Seconds of the rank that took longest, of all at once, each on a core; their starts and plans are left out."""
    remove(folder)
    cores, children = sorted(os.sched_getaffinity(0)), []
    for index in range(count):
        home = {"HF_HOME": str(folder / f"home-{index}"), "XDG_CACHE_HOME": str(folder / f"cache-{index}")}
        command = ["int4-to-bf16", source, target, "--shard-size=30MB", "--threads=4", "--disk-budget=1TB", "--json"]
        words = ["taskset", "-c", str(cores[index % len(cores)]), KCONVERT, *command, f"--worker={index}/{count}"]
        environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", **home, **(variables[index] if variables else {})}
        children.append(subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True, env=environment))
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit("a rank failed")
    return max(float(json.loads(text)["seconds"]) for text in said)


def hub(source: Path, speed: float, pipe: Connection) -> None:
    from server import Hub

    with Hub() as served:
        served.speed = speed
        served.add(REPO, source)
        repository = served.repos[REPO]
        repository.commits, repository.branches = {COMMIT: repository.head()}, {"main": COMMIT}  # of all servers one
        pipe.send(served.url)
        pipe.recv()


def store(source: Path, speed: float, pipe: Connection) -> None:
    """moto's S3 behind a line, which takes the body of a request in as much time as that has bytes."""
    from s3_server import Bucket, Fault

    os.environ |= KEYS
    lock, free = threading.Lock(), [0.0]

    class Paced(Bucket):
        def __call__(self, environ: dict[str, object], start: Fault) -> object:
            with lock:
                free[0] = max(free[0], time.monotonic()) + int(str(environ.get("CONTENT_LENGTH") or 0)) / speed
                wait = free[0] - time.monotonic()
            time.sleep(max(0.0, wait))
            return super().__call__(environ, start)

    served = Paced()
    served.put("models", b"")
    pipe.send(served.url)
    pipe.recv()
    served.close()


if __name__ == "__main__":
    main()
