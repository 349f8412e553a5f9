"""`kconvert.open` of a repository: headers, and then the bytes of what is asked for."""

import subprocess
import sys
from pathlib import Path

import torch

import kconvert

NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


def test_tensors_come_from_the_hub_by_ranges(hub, remote: str, int4: Path) -> None:
    with kconvert.open(remote) as far, kconvert.open(int4) as near:
        assert far.keys() == near.keys()
        assert torch.equal(far[NAME], near[NAME])
        assert torch.equal(far.rows(NAME, 5, 9), near[NAME][5:9])


FORK = """
import os, sys
import kconvert
weights = kconvert.open(sys.argv[1])
ours = weights[sys.argv[2]]
if os.fork() == 0:
    same = bool((weights[sys.argv[2]] == ours).all())
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_process_reads_on_from_the_hub(hub, remote: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, remote, NAME], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
