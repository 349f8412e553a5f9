"""Disks that are full, broken, read-only, or without O_DIRECT."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import Result

if TYPE_CHECKING:
    from .conftest import Job, Tap

Broken = Callable[..., "AbstractContextManager[Tap]"]
MOMENTS = {"first": 0.0, "middle": 0.5, "late": 0.9, "last": 1.0}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("posix_fallocate", errno.ENOSPC),
        ("pwrite", errno.ENOSPC),
        ("pwrite", errno.EIO),
        ("fsync", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("rename", errno.EACCES),
        ("open", errno.EACCES),
        ("open", errno.EROFS),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_a_disk_that_fails_is_one_sentence_and_the_rerun_completes(
    job: Job, broken: Broken, call: str, fault: int, moment: float
) -> None:
    with broken(call, fault, job.destination, moment) as disk:
        result = job.run()

    assert disk.calls > 0
    job.check_error(result, str(job.destination), os.strerror(fault))
    job.check_no_half_files()
    job.check_rerun_finishes()


@pytest.mark.parametrize("fault", [errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("moment", [0.0, 0.5])
def test_a_directory_that_cannot_be_made_is_one_sentence(job: Job, broken: Broken, fault: int, moment: float) -> None:
    with broken("mkdir", fault, job.destination, moment):
        result = job.run()

    job.check_error(result, str(job.destination), os.strerror(fault))
    job.check_no_half_files()
    job.check_rerun_finishes()


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_journal_that_cannot_be_written_is_one_sentence(job: Job, tap: Broken, fault: int) -> None:
    def fail(call: int) -> None:
        if call == 3:
            raise OSError(fault, os.strerror(fault))

    with tap("fsync", job.destination / ".kconvert" / "journal.jsonl", fail) as journal:
        result = job.run()

    assert journal.calls >= 3
    job.check_error(result, str(job.destination), os.strerror(fault))
    job.check_no_half_files()
    job.check_rerun_finishes()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_fails_leaves_no_unfinished_shard_to_take_its_space(job: Job, broken: Broken, call: str) -> None:
    with broken(call, errno.ENOSPC, job.destination, 0.5):
        assert job.run().exit_code == 2

    assert [name for name in job.state if name.endswith(".safetensors.part")] == []


def test_finished_shards_are_kept_when_the_disk_fills(job: Job, broken: Broken) -> None:
    with broken("posix_fallocate", errno.ENOSPC, job.destination, 0.5):
        assert "finished shards are kept" in job.run().stderr
    before = {name: (job.destination / name).stat().st_mtime_ns for name in job.shards}
    assert len(before) > 5

    job.check_rerun_finishes()

    assert [name for name in before if (job.destination / name).stat().st_mtime_ns != before[name]] == []


def test_a_disk_that_turns_read_only_in_the_middle_is_one_sentence(job: Job, tap: Broken) -> None:
    """What ext4 does after an error: nothing can be written, and nothing removed either."""
    read_only = False

    def write(call: int) -> None:
        nonlocal read_only
        if call > 50:
            read_only = True
        check(call)

    def check(call: int) -> None:
        if read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with ExitStack() as disk:
        disk.enter_context(tap("pwrite", job.destination, write))
        for call in ("unlink", "open", "rename"):
            disk.enter_context(tap(call, job.destination, check))
        result = job.run()

    job.check_error(result, str(job.destination), os.strerror(errno.EROFS))
    job.check_no_half_files()
    job.check_rerun_finishes()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_too_small_is_refused_before_anything_is_written(
    job: Job, mounted: Callable[..., Path], kind: str
) -> None:
    job.destination = mounted(kind, 3 << 20) / "bf16"

    result = job.run()

    job.check_error(result, str(job.destination), "needs", "free")
    assert not job.destination.exists()


def test_a_disk_too_small_is_refused_by_a_dry_run(job: Job, mounted: Callable[..., Path]) -> None:
    job.destination = mounted("tmpfs", 3 << 20) / "bf16"

    job.check_error(job.run("--dry-run"), "needs", "free")


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_somebody_else_fills_is_one_sentence_and_the_rerun_completes(
    job: Job, mounted: Callable[..., Path], tap: Broken, kind: str
) -> None:
    disk = mounted(kind, 16 << 20)
    job.destination = disk / "bf16"

    def fill(call: int) -> None:
        if call == 60:
            subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'filler'}", "bs=64k"], check=False, capture_output=True)
            assert (disk / "filler").stat().st_size > 1 << 20

    with tap("pwrite", job.destination, fill):
        result = job.run()

    job.check_error(result, str(job.destination), os.strerror(errno.ENOSPC), "free some space")
    assert job.shards
    job.check_no_half_files()
    assert "config.json" not in job.files
    (disk / "filler").unlink()
    job.check_rerun_finishes()


def test_overwriting_counts_the_space_that_the_old_checkpoint_gives_back(
    job: Job, mounted: Callable[..., Path]
) -> None:
    job.destination = mounted("tmpfs", 8 << 20) / "bf16"
    assert job.run().exit_code == 0

    job.check_rerun_finishes("--overwrite")


def test_a_resumed_run_needs_only_the_space_of_what_is_missing(job: Job, mounted: Callable[..., Path]) -> None:
    job.destination = mounted("tmpfs", 8 << 20) / "bf16"
    assert job.run().exit_code == 0
    (job.destination / job.shards[0]).unlink()

    job.check_rerun_finishes()


def test_a_read_only_disk_is_one_sentence(job: Job, mounted: Callable[..., Path]) -> None:
    job.destination = mounted("tmpfs", 64 << 20, "ro") / "bf16"

    job.check_error(job.run(), str(job.destination), "mounted read-only")


@pytest.mark.parametrize("below", ["file/bf16", "file/deep/bf16"])
def test_a_destination_below_a_file_is_one_sentence(job: Job, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("precious")
    job.destination = tmp_path / below

    job.check_error(job.run(), str(job.destination), os.strerror(errno.ENOTDIR))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_destination_that_is_a_file_is_refused(job: Job, tmp_path: Path, command: Callable[..., Result]) -> None:
    job.destination = tmp_path / "file"
    job.destination.write_text("precious")

    result = job.run("--overwrite")

    assert result.exit_code == 2
    assert "is a file" in result.stderr
    assert job.destination.read_text() == "precious"


@pytest.mark.parametrize("call", ["open", "preadv", "pwrite"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_system_that_refuses_direct_io_is_used_through_the_page_cache(
    job: Job, refuse_direct: Callable[..., list[str]], call: str, threads: int
) -> None:
    refused = refuse_direct(call)

    result = job.run("--threads", threads)

    assert refused, "nothing was tried past the page cache"
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    job.check_finished()


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_workers_that_are_refused_direct_io_on_one_file_at_the_same_time_all_fall_back(
    job: Job, refuse_direct: Callable[..., list[str]], call: str
) -> None:
    refused = refuse_direct(call, delay=0.02)

    result = job.run("--threads", 4, "--memory", "256KB", "--shard-size", "5GB")

    assert len(refused) > 1, "no two workers were refused"
    assert result.exit_code == 0, result.output


def test_two_file_systems_give_the_same_bytes(job: Job, mounted: Callable[..., Path]) -> None:
    job.destination = mounted("tmpfs", 32 << 20) / "bf16"
    job.check_rerun_finishes()
    job.destination = mounted("ext4", 32 << 20) / "bf16"
    job.check_rerun_finishes()
