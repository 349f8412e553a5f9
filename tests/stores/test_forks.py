"""A store that is read before a fork and after it, as the workers of a loader do; obstore itself would stand still there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from s3_server import SECRET, Bucket, Fault, Request, status

from kconvert import open as open_weights

LOADER = """
import sys, torch
import kconvert
from torch.utils.data import DataLoader, Dataset

class Tensors(Dataset):
    def __init__(self, weights):
        self.weights, self.names = weights, sorted(weights)
    def __len__(self):
        return len(self.names)
    def __getitem__(self, number):
        return self.weights[self.names[number]].view(torch.uint8).sum().item()

with kconvert.open(sys.argv[1], threads=2) as weights:
    first = Tensors(weights)[0]
    loaded = DataLoader(Tensors(weights), batch_size=None, num_workers=2, multiprocessing_context="fork")
    print(first, *loaded)
"""
FORK = """
import os, sys
import kconvert
weights = kconvert.open(sys.argv[1])
name = min(weights)
weights[name]
if os.fork() == 0:
    try:
        {work}
    except kconvert.KconvertError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
os.wait()
"""


def python(script: str, *words: object) -> str:
    """In a process without the server's threads."""
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done.stdout


def test_the_workers_of_a_loader_read_what_was_opened_before_they_were_forked(stored: str, int4: Path) -> None:
    with open_weights(int4) as weights:
        sums = [int(weights[name].view(torch.uint8).sum()) for name in sorted(weights)]

    assert [int(word) for word in python(LOADER, stored).split()] == [sums[0], *sums]


def test_what_a_store_refuses_is_said_in_a_fork_too(bucket: Bucket, stored: str) -> None:
    signs: list[Request] = []

    def watch(request: Request) -> Fault | None:
        if request.name == "models/now":
            signs.append(request)
        return status("403 No") if signs else None

    bucket.watch = watch
    sign = f"import urllib.request as r; r.urlopen({bucket.url + '/models/now'!r})"
    said = python(FORK.format(work=f"try: {sign}\n        except OSError: pass\n        weights[name]"), stored)

    assert said.startswith(f"{stored}: cannot read model-")
    assert said.endswith("access was refused; check the credentials, as the store's own command line takes them\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("work", ["kconvert.open(sys.argv[1])", "kconvert.inspect('s3://models/other')"])
def test_a_store_is_not_opened_in_a_fork_of_who_has_used_one(stored: str, work: str) -> None:
    said = python(FORK.format(work=work), stored)

    assert "cannot be opened in a process that was forked from one that has used a store" in said
    assert said.count("\n") == 1


THREADS = """
import os, pathlib, signal, sys
import kconvert
from kconvert.stores import forked
weights = kconvert.open(sys.argv[1], threads=4)
names = sorted(weights)
weights[names[0]]
if os.fork() == 0:
    found = [weights[name] for name in names]  # by several threads, all of which come first
    reader = forked._own._found.process
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    print(len(found), all(a.equal(weights[name]) for a, name in zip(found, names)), forked._own._found.process != reader)
    sys.stdout.flush()
    os._exit(0)
os.wait()
"""


def test_threads_of_a_fork_share_one_reader_and_get_another_when_that_has_ended(stored: str, int4: Path) -> None:
    with open_weights(int4) as weights:
        count = len(weights)
    assert python(THREADS, stored).split() == [str(count), "True", "True"]


def test_a_reader_takes_no_modules_of_the_folder_that_one_is_in(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "selectors.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    script = "import sys; sys.path.remove('')\n" + FORK.format(work="print(weights[name].shape)")
    assert "Size" in python(script, stored)
    assert not (tmp_path / "ran").exists()
