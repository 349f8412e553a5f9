"""What a plan writes, without its data: true headers over holes, and the small files."""

from __future__ import annotations

from pathlib import Path

from kconvert.planning.plan import Plan


def write_headers(plan: Plan, root: Path) -> Path:
    """`root`, with the files of `plan` in it."""
    for shard in plan.shards:
        path = root / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    texts = {name: bytes(text) for name, text in plan.texts.items()}
    if plan.source is not None:
        texts = {**{name: plan.source.side_file(name).read_bytes() for name in plan.side_files}, **texts}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return root
