"""What is already there: the source itself, foreign files, another conversion, a finished one."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Job, Tap

Kconvert = Callable[..., Any]


def modified(job: Job) -> dict[str, int]:
    return {name: (job.destination / name).stat().st_mtime_ns for name in job.shards}


# Destinations that could harm the source.


def same(source: Path, link: Path) -> tuple[Path, Path]:
    return source, source


def same_by_a_detour(source: Path, link: Path) -> tuple[Path, Path]:
    return source, source / "docs" / ".."


def link_to_source(source: Path, link: Path) -> tuple[Path, Path]:
    link.symlink_to(source)
    return source, link


def source_is_link(source: Path, link: Path) -> tuple[Path, Path]:
    link.symlink_to(source)
    return link, source


def inside_source(source: Path, link: Path) -> tuple[Path, Path]:
    return source, source / "deep" / "bf16"


def inside_source_by_link(source: Path, link: Path) -> tuple[Path, Path]:
    link.symlink_to(source)
    return source, link / "bf16"


def around_source(source: Path, link: Path) -> tuple[Path, Path]:
    return source, source.parent


def around_source_by_link(source: Path, link: Path) -> tuple[Path, Path]:
    link.symlink_to(source.parent)
    return source, link


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    "places",
    [
        same,
        same_by_a_detour,
        link_to_source,
        source_is_link,
        inside_source,
        inside_source_by_link,
        around_source,
        around_source_by_link,
    ],
)
def test_a_destination_that_touches_the_source_is_refused(
    fragile: Job,
    tree: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    places: Callable[[Path, Path], tuple[Path, Path]],
    overwrite: list[str],
) -> None:
    before = tree(tmp_path)
    fragile.source, fragile.destination = places(fragile.source, tmp_path / "link")

    result = fragile.run(*overwrite)

    fragile.check_error(result, "SRC", "choose a")
    (tmp_path / "link").unlink(missing_ok=True)
    assert tree(tmp_path) == before


# Foreign content.


def test_a_destination_with_foreign_content_is_refused_and_left_alone(job: Job) -> None:
    job.destination.mkdir()
    (job.destination / "thesis.txt").write_text("precious")

    job.check_error(job.run(), str(job.destination), "not empty", "thesis.txt", "--overwrite")

    assert os.listdir(job.destination) == ["thesis.txt"]


def test_a_destination_with_another_checkpoint_is_refused_and_left_alone(job: Job, bf16_copy: Path) -> None:
    job.destination = bf16_copy
    before = job.files

    job.check_error(job.run(), str(job.destination), "not empty", "--overwrite")

    assert job.files == before


def test_an_empty_destination_is_fine(job: Job) -> None:
    job.destination.mkdir()

    job.check_rerun_finishes()


def test_overwriting_replaces_the_checkpoint_and_keeps_what_is_none(job: Job, bf16_copy: Path) -> None:
    job.destination = bf16_copy
    (bf16_copy / "thesis.txt").write_text("precious")
    stale = bf16_copy / "model-00001-of-00002.safetensors"
    stale.write_bytes(b"stale")

    assert job.run("--overwrite").exit_code == 0

    assert (bf16_copy / "thesis.txt").read_text() == "precious"
    (bf16_copy / "thesis.txt").unlink()
    job.check_finished()


def test_an_interrupted_overwrite_is_visibly_unfinished(
    job: Job, bf16_copy: Path, broken: Callable[..., AbstractContextManager[Tap]]
) -> None:
    job.destination = bf16_copy
    with broken("posix_fallocate", errno.ENOSPC, job.destination, 0.5):
        assert job.run("--overwrite").exit_code == 2

    assert job.shards
    assert "model.safetensors.index.json" not in job.files
    assert "config.json" not in job.files


def test_an_interrupted_overwrite_goes_on_without_the_option(
    job: Job, bf16_copy: Path, broken: Callable[..., AbstractContextManager[Tap]]
) -> None:
    job.destination = bf16_copy
    with broken("posix_fallocate", errno.ENOSPC, job.destination, 0.5):
        assert job.run("--overwrite").exit_code == 2
    kept = modified(job)
    assert kept

    job.check_rerun_finishes()

    assert {name: modified(job)[name] for name in kept} == kept


def test_an_interrupted_overwrite_goes_on_with_the_same_command(
    job: Job, bf16_copy: Path, broken: Callable[..., AbstractContextManager[Tap]]
) -> None:
    """The message says: run the same command again, finished shards are kept."""
    job.destination = bf16_copy
    with broken("posix_fallocate", errno.ENOSPC, job.destination, 0.5):
        assert "run the same command again, finished shards are kept" in job.run("--overwrite").stderr
    kept = modified(job)

    job.check_rerun_finishes("--overwrite")

    assert {name: modified(job)[name] for name in kept} == kept


# Another plan.


def test_a_rerun_with_another_shard_size_is_refused_and_changes_nothing(
    job: Job, broken: Callable[..., AbstractContextManager[Tap]]
) -> None:
    with broken("posix_fallocate", errno.ENOSPC, job.destination, 0.5):
        assert job.run().exit_code == 2
    before = job.files

    result = job.run("--shard-size", "1MB")

    job.check_error(result, str(job.destination), "other settings", "--overwrite")
    assert job.files == before
    job.check_rerun_finishes()


def test_a_rerun_with_another_selection_is_refused(job: Job) -> None:
    assert job.run().exit_code == 0

    job.check_error(job.run("--exclude", "lm_head*"), "other settings")


def test_overwriting_replaces_the_conversion_with_another_shard_size(job: Job, bf16: Path) -> None:
    assert job.run("--shard-size", "1MB").exit_code == 0
    assert job.files == job.tree(bf16)

    job.check_rerun_finishes("--overwrite")


# The same plan.


def test_a_rerun_after_completion_writes_no_shard_again(job: Job) -> None:
    assert job.run().exit_code == 0
    before = modified(job)

    job.check_rerun_finishes()

    assert modified(job) == before


@pytest.mark.parametrize("threads", [1, 3])
def test_a_rerun_after_completion_may_use_other_threads_and_memory(job: Job, threads: int) -> None:
    assert job.run().exit_code == 0
    before = modified(job)

    job.check_rerun_finishes("--threads", threads, "--memory", "1MB")

    assert modified(job) == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("harm", [flip, truncate, grow, Path.unlink])
def test_a_finished_shard_that_somebody_touched_is_written_again_and_no_other(
    job: Job, harm: Callable[[Path], None]
) -> None:
    assert job.run().exit_code == 0
    before = modified(job)
    victim = job.shards[3]
    harm(job.destination / victim)

    job.check_rerun_finishes()

    assert [name for name, time in modified(job).items() if time != before[name]] == [victim]


def test_a_finished_conversion_is_visibly_unfinished_while_shards_are_written_again(
    job: Job, broken: Callable[..., AbstractContextManager[Tap]]
) -> None:
    assert job.run().exit_code == 0
    for name in job.shards[5:]:
        (job.destination / name).unlink()

    with broken("posix_fallocate", errno.ENOSPC, job.destination, 0.1):
        assert job.run().exit_code == 2

    assert len(job.shards) < sum(name.endswith(".safetensors") for name in job.whole)
    job.check_no_half_files()
    job.check_rerun_finishes()


def test_a_side_file_that_somebody_changed_is_copied_again(job: Job) -> None:
    assert job.run().exit_code == 0
    (job.destination / "chat_template.jinja").write_text("changed")
    (job.destination / "tokenizer_config.json").unlink()

    job.check_rerun_finishes()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_journal_whose_last_line_was_cut_short_costs_that_shard_only(job: Job, cut: int) -> None:
    assert job.run().exit_code == 0
    before = modified(job)
    journal = job.destination / ".kconvert" / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - cut)

    job.check_rerun_finishes()

    assert sum(time != before[name] for name, time in modified(job).items()) <= 1


@pytest.mark.parametrize("rest", [bytes(100), b"\xff\xfe\x80" * 30, b"[" * 100_000], ids=["zeros", "garbage", "deep"])
def test_a_journal_that_ends_in_rubbish_is_survived(job: Job, rest: bytes) -> None:
    """What some file systems leave after a power failure."""
    assert job.run().exit_code == 0
    with open(job.destination / ".kconvert" / "journal.jsonl", "ab") as file:
        file.write(rest)

    job.check_rerun_finishes()


def test_a_lost_journal_is_foreign_content(job: Job) -> None:
    assert job.run().exit_code == 0
    (job.destination / ".kconvert" / "journal.jsonl").unlink()

    job.check_error(job.run(), "not empty", "--overwrite")


# Files.


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_gets_the_mode_of_the_umask(job: Job, kconvert: Kconvert, umask: int, mode: int) -> None:
    result = kconvert(*job.arguments, umask=umask)

    assert result.returncode == 0, result.stderr
    modes = {name: stat.S_IMODE((job.destination / name).stat().st_mode) for name in job.files}
    assert modes == dict.fromkeys(job.whole, mode)


def test_a_source_of_read_only_files_gives_files_that_can_be_written(fragile: Job) -> None:
    for path in fragile.source.rglob("*"):
        if path.is_file():
            path.chmod(0o444)

    fragile.check_rerun_finishes()

    modes = {stat.S_IMODE((fragile.destination / name).stat().st_mode) for name in fragile.files}
    assert {mode & 0o200 for mode in modes} == {0o200}
