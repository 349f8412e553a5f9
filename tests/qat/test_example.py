"""The example runs, at settings that prove nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "qat_recovery.py"


@pytest.mark.parametrize(("grid", "group"), [("int4", 128), ("mxfp4", 32)])
def test_the_recovery_example_runs_and_its_export_computes_the_trainers_logits(tmp_path, grid, group):
    sizes = [
        "--grid",
        grid,
        "--group",
        str(group),
        "--seeds",
        "1",
        "--pretrain",
        "3",
        "--steps",
        "2",
        "--files",
        "26",
        "--held-out",
        "4",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run([sys.executable, EXAMPLE, *sizes], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "bit for bit: True" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["way"], row["group"]) for row in rows] == [
        ("BF16", 0),
        *[(way, group) for way in ("PTQ", "QAT", "QAT+KD")],
    ]
    assert (tmp_path / "recovery.png").stat().st_size
