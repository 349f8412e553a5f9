"""Every encoding of a small model, loaded by every engine that could read it: what each computes, beside the values in BF16.

    python benchmarks/engines/run.py [--only LABEL] [--engine NAME] [--python ENGINE=PATH] [--write docs/ENGINES.md]

An engine lives in an environment of its own, see environments.py, unless --python names one. Of transformers, vLLM, mlx-lm and
llama.cpp these are logits, held against transformers' of the BF16 twin; of kt-kernel the output of a layer's experts, see
by_kt.py; of SGLang, which runs on no CPU, the scheme for experts that its own code chooses. An engine that cannot be had here
was not run, and the table says so in its column.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from environments import Environment, environment
from outputs import OUTPUTS, Output
from served import smoked

HERE = Path(__file__).parent
ENGINES = {
    "transformers": "by_transformers.py",
    "vllm": "by_vllm.py",
    "sglang": "by_sglang.py",
    "kt": "by_kt.py",
    "llama.cpp": "by_llama.py",
    "mlx": "by_mlx.py",
}
SIZES = "--layers 3 --experts 16 --hidden 512 --intermediate 512 --moe-intermediate 256 --vocab 512 --heads 4"
PATIENCE = 900  # seconds for one engine and one output
NOT_RUN = "not run"
RAISED = re.compile(r"(?:^|[])]:? )((?:\w+[.])*\w*Error: .+)")  # behind what a logger says of time and place
BEGIN, END = "<!-- written by `make engines` -->", "<!-- end of what `make engines` wrote -->"


@dataclass(frozen=True)
class Cell:
    """What came of an output in an engine; `why` is the engine's last word where it did not compute."""

    text: str
    why: str = ""


def main() -> int:
    asked = arguments()
    given = dict(pair.split("=", 1) for pair in asked.python)
    engines = [name for name in ENGINES if not asked.engine or name in asked.engine]
    found = {name: Environment(given[name]) if name in given else had(name) for name in engines}
    pythons = {name: place.python for name, place in found.items()}
    table: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory(dir=asked.dir) as folder:
        root = Path(folder)
        source = sample(root)
        for output in chosen(asked.only):
            table[output.label] = cells = row(output, source, root, pythons)
            for engine, cell in cells.items():
                print(f"{output.label}: {engine}: {cell.text}{f' ({cell.why})' if cell.why else ''}", flush=True)
        answers = f"- `kconvert smoke` behind vLLM's own server: {served(pythons.get('vllm'), root)}"
    print(answers)
    if asked.write:
        rewrite(Path(asked.write), f"{rendered(table, found)}\n{answers}")
    return 0


def served(python: str | None, root: Path) -> str:
    """What `kconvert smoke` says of vLLM's server."""
    folder = root / "served"
    folder.mkdir()
    return NOT_RUN if python is None else smoked(python, folder)


def had(engine: str) -> Environment:
    found = environment(engine)
    print(f"{engine}: {'; '.join(filter(None, (found.has, found.remark)))}", flush=True)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="LABEL")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--dir", help="where the models are made")
    parser.add_argument("--write", metavar="ENGINES.md", help="put the table into this page")
    asked = parser.parse_args()
    if asked.write and (asked.only or asked.engine):
        parser.error("the page has the whole table: --write goes without --only and --engine")
    return asked


def chosen(labels: list[str] | None) -> list[Output]:
    """All, or those of the labels with what they are like."""
    wanted = set(labels or ()) | {output.like for output in OUTPUTS if output.label in (labels or ())}
    return [output for output in OUTPUTS if not labels or output.label in wanted]


def kconvert(*words: str | Path) -> None:
    subprocess.run([Path(sys.executable).with_name("kconvert"), *words, "--quiet"], check=True)


def sample(root: Path) -> Path:
    """A small Kimi-K2 under the name of the class that engines have for it."""
    source = root / "source"
    kconvert("sample", source, "--like", "kimi-k2-thinking", *SIZES.split())
    config = json.loads((source / "config.json").read_text())
    config.pop("auto_map")
    (source / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
    return source


def row(output: Output, source: Path, root: Path, pythons: dict[str, str | None]) -> dict[str, Cell]:
    made = root / slug(output.label) if output.command else source
    if output.command:
        command, *options = output.command
        kconvert(command, source, made, *options)
    twin = root / f"{slug(output.like or output.label)}-bf16"
    if not output.like:
        kconvert("convert", made, twin, "--to", "bf16") if output.label != "bf16" else twin.symlink_to(made)
    wanted = logits_of(ask("transformers", sys.executable, twin, root)) if output.reads else None
    cells = {}
    for engine in output.engines:
        python = pythons.get(engine)
        if python is not None:
            more = (output.method, twin) if engine == "kt" else ()
            settings = output.environment if engine == "kt" else {}
            cells[engine] = judge(engine, ask(engine, python, made, root, *more, **settings), wanted)
    return cells


def slug(label: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in label)


def ask(
    engine: str, python: str, made: Path, root: Path, *more: str | Path, **environment: str
) -> dict[str, object] | Cell:
    """What an engine computed, with these settings in its environment, or why it did not."""
    result = root / "result.json"
    result.unlink(missing_ok=True)
    words = [python, HERE / ENGINES[engine], made, *more, result]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=PATIENCE, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        return Cell("no", f"no answer in {PATIENCE} s")
    if done.returncode or not result.exists():
        return Cell("no", reason(done.stdout + done.stderr))
    found: dict[str, object] = json.loads(result.read_text())
    return found


def reason(said: str) -> str:
    """The first error of a traceback that is more than a report of another one."""
    lines = [line.strip().removeprefix("[rank0]: ") for line in said.splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := RAISED.search(line)) and "Engine core" not in line]
    return (errors[:1] or lines[-1:] or ["ended without a word"])[0][:160]


def logits_of(found: dict[str, object] | Cell) -> np.ndarray:
    if isinstance(found, Cell):
        sys.exit(f"transformers does not load the BF16 twin: {found.why}")
    return np.array(found["logits"])


def judge(engine: str, found: dict[str, object] | Cell, wanted: np.ndarray | None) -> Cell:
    if isinstance(found, Cell):
        return found
    if engine == "kt":
        error = float(str(found["relative_error"]))
        return Cell(f"{error:.4f}" if np.isfinite(error) else "NaN")
    if "schemes" in found:
        return Cell(str(found["schemes"]))
    assert wanted is not None
    logits = np.array(found["logits"])
    if not np.isfinite(logits).all():
        return Cell("NaN")
    if np.array_equal(logits, wanted):
        return Cell("=")
    agree = int((logits.argmax(1) == wanted.argmax(1)).sum())
    return Cell(f"KL {divergence(wanted, logits):.1g}, {agree}/{len(wanted)}")


def divergence(wanted: np.ndarray, found: np.ndarray) -> float:
    """Kullback-Leibler in nats, the mean over positions."""
    ours, theirs = (rows - rows.max(1, keepdims=True) for rows in (wanted, found))
    ours, theirs = (rows - np.log(np.exp(rows).sum(1, keepdims=True)) for rows in (ours, theirs))
    return float((np.exp(ours) * (ours - theirs)).sum(1).mean())


def rendered(table: dict[str, dict[str, Cell]], found: dict[str, Environment]) -> str:
    lines = ["| output | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    notes: list[str] = []
    for label, cells in table.items():
        texts = []
        for engine, place in found.items():
            cell = cells.get(engine, Cell(""))
            if cell.why and cell.why not in notes:
                notes.append(cell.why)
            mark = f" ({notes.index(cell.why) + 1})" if cell.why else ""
            texts.append(NOT_RUN if place.python is None else cell.text + mark)
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    lines.append("")
    lines += [f"{number}. `{note.replace('`', '')}`" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *(described(engine, place) for engine, place in found.items())])


def described(engine: str, place: Environment) -> str:
    return f"- {engine}: {'; '.join(filter(None, (place.has, place.remark.replace('`', ''))))}"


def rewrite(page: Path, table: str) -> None:
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f"{page} has no place for the table between {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
