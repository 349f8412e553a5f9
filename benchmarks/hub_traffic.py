"""Looking at all of Kimi-K2-Thinking on the Hub: what inspect and a dry run fetch of its 594 GB, and how long they take.

The Hub is the tests', on 127.0.0.1; the repository's files are the sparse ones of planning.py. No weight may be fetched. The
client's cache is empty before each run.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from common import KCONVERT, Child, alternate, arguments, machine, remove, run, spread, table, tensor_files
from planning import write_holes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hub"))
from server import Content, Hub

INDEX = "model.safetensors.index.json"
REPO, LIKE = "moonshotai/Kimi-K2-Thinking", "kimi-k2-thinking"


def main() -> None:
    options = arguments(__doc__, runs=3).parse_args()
    source, home = options.dir / f"planning-{LIKE}", options.dir / "hub-home"
    if not (source / "config.json").exists():
        print(f"making {source} …", flush=True)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(write_holes, source, LIKE).result()
    with Hub() as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")
        names = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
        # Nothing fetches a shard, so nothing looks at its digest.
        hub.put(REPO, {name: Content(path, name.endswith(".safetensors"), "0" * 64) for name, path in names.items()})
        traffic: dict[str, list[tuple[int, int]]] = {}

        def look(name: str, *command: str | Path) -> Child:
            remove(home)
            hub.requests.clear()
            child = run([KCONVERT, *command], allowed=(0, 2))
            traffic.setdefault(name, []).append((hub.sent(), len(hub.requests)))
            return child

        dst = options.dir / "hub-dst"
        sides = {
            "inspect": lambda: look("inspect", "inspect", REPO, "--json"),
            "int4-to-fp8 --dry-run": lambda: look(
                "int4-to-fp8 --dry-run", "int4-to-fp8", REPO, dst, "--dry-run", "--json"
            ),
        }
        results = alternate(options.runs, sides)
    remove(home)
    plan = json.loads(results["int4-to-fp8 --dry-run"][0].stdout)
    headers, index = sum(map(header_bytes, tensor_files(source))), (source / INDEX).stat().st_size
    print(
        f"\n{plan['download_bytes'] / 1e9:,.1f} GB in the repository, {headers / 1e6:.1f} MB of them headers; the index, "
        f"which is not needed, has {index / 1e6:.1f} MB"
    )
    rows = [
        [
            name,
            f"{median(sent for sent, _ in traffic[name]) / 1e6:.1f} MB",
            f"{median(count for _, count in traffic[name]):.0f}",
            spread([child.seconds for child in children], 1, "s"),
            spread([child.peak / 1e6 for child in children], 0, "MB"),
        ]
        for name, children in results.items()
    ]
    table(["", "fetched", "requests", "wall time", "peak RSS"], rows)
    machine(options.dir)


def header_bytes(file: Path) -> int:
    with open(file, "rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


if __name__ == "__main__":
    main()
