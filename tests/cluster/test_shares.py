"""What comes back from the machines of a cluster in whatever order, and what they are asked for; without Ray itself."""

from __future__ import annotations

import pickle
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from kconvert import CheckFailed, KconvertError, Report, verify
from kconvert.checkpoint.source import open_directory
from kconvert.proof.parity.comparing import Job


class Backwards:
    """A cluster whose last task is done first."""

    slots, cpus = 2, 1

    def __init__(self, address: str | None) -> None:
        self.address = address

    def call(self, work: Any, numbers: Iterable[int], tell: Any) -> Generator[tuple[int, Any], None, None]:
        elsewhere = pickle.loads(pickle.dumps(work))
        for number in sorted(numbers, reverse=True):
            yield number, pickle.loads(pickle.dumps(elsewhere(number, tell)))

    def __enter__(self) -> Backwards:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kconvert.proof.parity.shares.SHARE", 1)
    monkeypatch.setattr("kconvert.proof.verify.Cluster", Backwards)


def spoil(root: Path) -> None:
    """The first element of every expert's last matrix."""
    for name, tensor in open_directory(root).tensors.items():
        if name.endswith("down_proj.weight"):
            with (root / tensor.file).open("r+b") as file:
                file.seek(tensor.start)
                file.write(b"\x12\x34")


def told(report: Report) -> tuple[Any, ...]:
    return report.faults, report.comparisons, report.spreads, report.worst, report.digests, report.reference


@pytest.mark.parametrize("sample", [1.0, 0.3])
def test_the_report_is_in_order_whoever_ends_first(int4: Path, bf16_copy: Path, sample: float) -> None:
    spoil(bf16_copy)
    options = {"sample": sample, "keep_going": True, "digest": True}

    here = verify(int4, bf16_copy, **options)
    there = verify(int4, bf16_copy, **options, engine="ray")

    assert len(here.faults) > 1
    assert told(there) == told(here)


def test_what_cannot_be_read_does_not_hide_the_fault_before_it(
    int4: Path, bf16_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, compare = verify(int4, bf16_copy), Job.compare
    spoil(bf16_copy)

    def failing(job: Job, number: int, quickly: bool = True) -> Any:
        if job.pairs[number][0] == last:
            raise KconvertError("the disk is broken")
        return compare(job, number, quickly)

    last = whole.source.weights[-1]
    monkeypatch.setattr(Job, "compare", failing)

    with pytest.raises(CheckFailed, match="down_proj"):
        verify(int4, bf16_copy, engine="ray")
    with pytest.raises(KconvertError, match=r"the disk is broken \(on .*\)"):
        verify(int4, bf16_copy, engine="ray", keep_going=True)


def test_a_share_ends_with_its_first_fault(int4: Path, bf16_copy: Path) -> None:
    spoil(bf16_copy)
    whole: list[int] = []
    first: list[int] = []

    verify(int4, bf16_copy, engine="ray", keep_going=True, advance=whole.append)
    with pytest.raises(CheckFailed):
        verify(int4, bf16_copy, engine="ray", advance=first.append)

    assert sum(first) < sum(whole) == open_directory(bf16_copy).nbytes


def test_a_node_that_sees_another_output(int4: Path, bf16_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(address: str | None) -> Backwards:
        next(bf16_copy.glob("*.safetensors")).touch()
        return Backwards(address)

    monkeypatch.setattr("kconvert.proof.verify.Cluster", changed)

    with pytest.raises(KconvertError, match="they must have the same files everywhere, with the same sizes and times"):
        verify(int4, bf16_copy, engine="ray")
