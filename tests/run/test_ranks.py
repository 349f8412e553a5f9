"""Ranks: processes that share a conversion, and what becomes of it when one dies, or is the double or a stranger of another."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kconvert import KconvertError, Recipe, convert, finalize, plan
from kconvert.run.state.ranks import Rank, deal

from .conftest import SLOW, run_command

if TYPE_CHECKING:
    from .conftest import Job


def start(job: Job, worker: str, *options: object, code: str = SLOW) -> subprocess.Popen[str]:
    """The rank as a process of its own, slowed down."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *job.arguments, "--worker", worker, *map(str, options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_ranks(job: Job, count: int, *options: object) -> None:
    """All ranks at once, to their end."""
    processes = [start(job, f"{index}/{count}", *options) for index in range(count)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said


def run_in_turn(job: Job, count: int) -> None:
    """All ranks, the last first, in this process."""
    for index in reversed(range(count)):
        result = job.run("--worker", f"{index}/{count}")
        assert result.exit_code == 0, result.output


def records_of(job: Job, rank: int) -> int:
    journal = job.destination / ".kconvert" / "ranks" / str(rank) / "journal.jsonl"
    return journal.read_text().count('"shard"') if journal.exists() else 0


def wait_for(job: Job, rank: int, count: int, process: subprocess.Popen[str]) -> None:
    """Until the journal of a rank knows `count` shards, or its process has ended."""
    deadline = time.monotonic() + 60
    while records_of(job, rank) < count and process.poll() is None:
        assert time.monotonic() < deadline, "the rank makes no progress"
        time.sleep(0.001)


def close(job: Job) -> None:
    result = run_command("finalize", job.destination)
    assert result.exit_code == 0, result.output
    job.check_finished()


# Shares.


@given(st.lists(st.integers(0, 10**10), max_size=60), st.integers(1, 20))
def test_no_rank_gets_more_than_one_shard_more_than_another(sizes: list[int], count: int) -> None:
    ranks = deal(sizes, count)

    loads = Counter(dict.fromkeys(range(count), 0))
    for rank, size in zip(ranks, sizes, strict=True):
        loads[rank] += size
    assert set(ranks) <= set(range(count))
    assert max(loads.values()) - min(loads.values()) <= max(sizes, default=0)


def test_the_ranks_share_every_shard_once(int4: Path) -> None:
    whole = plan(int4, Recipe("bf16", shard_size=100_000))

    shares = [Rank(index, 3).share(whole) for index in range(3)]

    assert sorted(name for share in shares for name in share) == sorted(shard.name for shard in whole.shards)


# Together.


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_write_what_one_machine_writes(job: Job, count: int) -> None:
    run_ranks(job, count)
    job.check_no_half_files()
    assert "config.json" not in job.files

    close(job)


def test_the_last_rank_closes_the_directory_when_it_is_asked_to(job: Job) -> None:
    run_ranks(job, 3, "--finalize-when-complete")

    job.check_finished()


def test_ranks_one_after_the_other_need_not_be_at_work_together(job: Job) -> None:
    for index in (2, 0, 1):
        assert "config.json" not in job.files
        assert job.run("--worker", f"{index}/3", "--finalize-when-complete").exit_code == 0

    job.check_finished()


def test_more_ranks_than_shards_leave_some_without_work(job: Job) -> None:
    job_of_few = [*job.arguments[:-1], "1GB"]
    for index in (3, 0, 1, 2):
        result = run_command(*job_of_few, "--worker", f"{index}/4")
        assert result.exit_code == 0, result.output
        assert ("nothing left to do" in result.output) == (index > 0)

    assert run_command("finalize", job.destination).exit_code == 0
    assert len(job.shards) == 1


def test_a_tensor_that_is_scattered_over_the_shards_of_several_ranks_is_whole(
    scattered: Path, tmp_path: Path, job: Job
) -> None:
    """Its parts are made by every rank that has one of them."""
    recipe = Recipe("bf16", shard_size=300_000)
    convert(plan(scattered, recipe), tmp_path / "one")
    for index in range(3):
        convert(plan(scattered, recipe), tmp_path / "ranks", worker=f"{index}/3")
    finalize(tmp_path / "ranks")

    assert job.tree(tmp_path / "ranks") == job.tree(tmp_path / "one")


def test_every_command_that_writes_shards_knows_ranks(job: Job, tmp_path: Path) -> None:
    sizes = ("--layers", 2, "--experts", 4, "--hidden", 256, "--moe-intermediate", 512, "--vocab", 512)
    commands = {
        "sample": ("sample", tmp_path / "sample", *sizes, "--shard-size", "1MB"),
        "amx": ("repack-amx", tmp_path / "sample", tmp_path / "amx", "--method", "AMXINT4", "--numa", 2),
    }
    for name, command in commands.items():
        assert run_command(*command, "-q").exit_code == 0
        whole = job.tree(tmp_path / name)
        shutil.rmtree(tmp_path / name)
        for index in range(2):
            result = run_command(*command, "--worker", f"{index}/2")
            assert result.exit_code == 0, result.output
        assert run_command("finalize", tmp_path / name).exit_code == 0
        assert job.tree(tmp_path / name) == whole


def test_a_closed_directory_tells_as_much_as_that_of_one_run(job: Job) -> None:
    run_in_turn(job, 2)
    close(job)

    result = job.run()

    assert result.exit_code == 0
    assert "was finished already" in result.output
    verified = run_command("verify", job.source, job.destination)
    assert verified.exit_code == 0, verified.output


# Killed and started again.


def kill_ranks(job: Job, kills: int, seed: int, count: int = 3) -> None:
    """Start all ranks, kill one at a random moment and start it again, until `kills` have hit; then let all end."""
    dice = random.Random(seed)
    ranks = {index: start(job, f"{index}/{count}") for index in range(count)}
    try:
        for _ in range(kills):
            victim = dice.randrange(count)
            if dice.random() < 0.3:
                time.sleep(dice.uniform(0, 1))
            else:
                wait_for(job, victim, records_of(job, victim) + dice.randint(1, 3), ranks[victim])
            ranks[victim].send_signal(signal.SIGKILL)
            ranks[victim].wait()
            job.check_no_half_files()
            ranks[victim] = start(job, f"{victim}/{count}")
        for process in ranks.values():
            said = process.communicate(timeout=120)[1]
            assert process.returncode == 0, said
    finally:
        for process in ranks.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_rank_that_is_killed_goes_on_when_it_is_started_again(job: Job, seed: int) -> None:
    kill_ranks(job, 3, seed)

    close(job)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_ranks_killed_at_random_moments_change_no_byte(job: Job, seed: int) -> None:
    kill_ranks(job, 6, 100 + seed)

    close(job)


def test_a_rank_that_is_started_again_keeps_what_it_had(job: Job) -> None:
    with start(job, "1/2") as process:
        wait_for(job, 1, 4, process)
        process.send_signal(signal.SIGKILL)
    before = {name: (job.destination / name).stat().st_mtime_ns for name in job.shards}

    run_in_turn(job, 2)

    kept = [name for name, mtime in before.items() if (job.destination / name).stat().st_mtime_ns == mtime]
    assert len(kept) >= 4
    close(job)


def test_a_closing_that_is_killed_is_done_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_turn(job, 2)
    moments = 0

    def stop(real: object) -> object:
        def rename(*names: object) -> None:
            nonlocal moments
            moments += 1
            if moments % 3 == 0:
                raise KeyboardInterrupt
            real(*names)  # type: ignore[operator]

        return rename

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop(os.rename))
        assert run_command("finalize", job.destination).exit_code == 130
    job.check_no_half_files()

    close(job)


# Strangers and doubles.


def test_two_ranks_with_the_same_number_at_once(job: Job) -> None:
    with start(job, "1/2") as first:
        wait_for(job, 1, 1, first)
        result = job.run("--worker", "1/2")
        job.check_error(result, "rank 1 of 2 is at work", "already", "number of its own")
        assert first.wait() == 0

    run_in_turn(job, 2)
    close(job)


STRANGER = """
import sys, kconvert.version
kconvert.version.__version__ = "9.9.9"
from kconvert.cli import main
main()
"""


def test_a_rank_with_another_version_of_kconvert(job: Job) -> None:
    assert job.run("--worker", "0/2").exit_code == 0

    with start(job, "1/2", code=STRANGER) as process:
        _, said = process.communicate(timeout=60)

    assert process.returncode == 2
    assert said.count("\n") == 1
    assert "is 9.9.9" in said
    assert job.run("--worker", "1/2").exit_code == 0
    close(job)


def test_a_rank_with_another_recipe(job: Job) -> None:
    assert job.run("--worker", "0/2").exit_code == 0

    result = run_command(*job.arguments, "--exclude", "*.experts.0.*", "--worker", "1/2")

    job.check_error(result, "other settings", "all ranks the same command")


def test_a_rank_that_sees_another_source(fragile: Job) -> None:
    assert fragile.run("--worker", "0/2").exit_code == 0
    next(fragile.source.glob("*.safetensors")).touch()

    fragile.check_error(fragile.run("--worker", "1/2"), "source files that have changed", "SRC", "without --worker")


def test_what_ranks_have_made_is_kept_when_a_file_of_the_source_was_replaced_by_a_sound_one(fragile: Job) -> None:
    assert fragile.run("--worker", "0/2").exit_code == 0
    before = {name: (fragile.destination / name).stat().st_mtime_ns for name in fragile.shards}
    replaced = min(fragile.source.glob("*.safetensors"))
    replaced.touch()

    assert fragile.run().exit_code == 0
    kept = {name for name, mtime in before.items() if (fragile.destination / name).stat().st_mtime_ns == mtime}
    assert kept == before.keys() - set(fragile.shards_of(replaced.name))
    assert kept
    fragile.check_finished()


@pytest.mark.parametrize("worker", ["1/3", "0/1", "2/3"])
def test_a_rank_of_another_number_of_ranks(job: Job, worker: str) -> None:
    assert job.run("--worker", "0/2").exit_code == 0

    job.check_error(job.run("--worker", worker), "shared by 2 ranks", "without --worker")


def test_ranks_of_two_plans_that_begin_at_the_same_moment(job: Job) -> None:
    """One of the plans is that of the directory, whoever comes first, and the other's ranks are told."""
    processes = [start(job, "0/2"), start(job, "1/2", "--exclude", "*.experts.0.*")]
    said = [process.communicate(timeout=60)[1] for process in processes]

    assert sorted(process.returncode for process in processes) == [0, 2], said
    assert sum("other settings" in text for text in said) == 1


def test_a_rank_that_never_ran_is_named(job: Job) -> None:
    for index in (0, 2, 3):
        assert job.run("--worker", f"{index}/5").exit_code == 0

    job.check_error(run_command("finalize", job.destination), "ranks 1 and 4 of 5 have not finished")
    assert "config.json" not in job.files


def test_what_rank_0_leaves_is_missed(job: Job) -> None:
    run_in_turn(job, 2)
    (job.destination / ".kconvert" / "ranks" / "0" / "closing" / "config.json").unlink()

    job.check_error(run_command("finalize", job.destination), "config.json", "rank 0 of 2")
    assert job.run("--worker", "0/2").exit_code == 0
    close(job)


@pytest.mark.parametrize("harm", ["gone", "touched", "longer", "header"])
def test_a_shard_that_somebody_touched_is_found_before_the_directory_is_closed(job: Job, harm: str) -> None:
    run_in_turn(job, 2)
    victim = job.destination / job.shards[1]
    then = victim.stat().st_mtime_ns
    if harm == "gone":
        victim.unlink()
    elif harm == "touched":
        victim.touch()
    elif harm == "longer":
        victim.write_bytes(victim.read_bytes() + b"more")
    else:
        victim.write_bytes(victim.read_bytes()[:20] + b"~" + victim.read_bytes()[21:])
        os.utime(victim, ns=(then, then))

    job.check_error(run_command("finalize", job.destination), victim.name)
    assert "config.json" not in job.files
    if harm == "header":
        victim.unlink()
    run_in_turn(job, 2)
    close(job)


def test_ranks_on_a_file_system_whose_locks_do_not_reach_the_other_machine(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one number may then be at work; they write files of their own, and what becomes visible is whole."""
    monkeypatch.setattr("fcntl.flock", lambda descriptor, mode: None)
    twins = [threading.Thread(target=run_to_any_end, args=(job,)) for _ in range(2)]
    for twin in twins:
        twin.start()
    for twin in twins:
        twin.join()

    job.check_no_half_files()
    for index in range(2):
        assert job.run("--worker", f"{index}/2").exit_code == 0
    close(job)


def run_to_any_end(job: Job) -> None:
    with suppress(KconvertError):  # the second may clear away what the first has not finished
        convert(plan(job.source, Recipe("bf16", "int4", shard_size=100_000)), job.destination, worker="0/2")


def test_a_file_system_without_locks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, mode: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("fcntl.flock", refuse)

    job.check_error(job.run("--worker", "0/2"), "has no locks (flock)")


# Ranks and runs without.


def test_a_run_without_ranks_goes_on_from_what_ranks_have_finished(job: Job) -> None:
    assert job.run("--worker", "1/3").exit_code == 0
    with start(job, "0/3") as process:
        wait_for(job, 0, 3, process)
        process.send_signal(signal.SIGKILL)
    before = {name: (job.destination / name).stat().st_mtime_ns for name in job.shards}
    recorded = records_of(job, 0) + records_of(job, 1)  # each worker may have had one that was not yet

    job.check_rerun_finishes()

    assert sum((job.destination / name).stat().st_mtime_ns == then for name, then in before.items()) >= recorded


def test_ranks_go_on_from_what_a_run_without_has_finished(job: Job) -> None:
    with job.start() as process:
        while job.records < 5 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    before = {name: (job.destination / name).stat().st_mtime_ns for name in job.shards}

    run_in_turn(job, 2)

    close(job)
    assert sum((job.destination / name).stat().st_mtime_ns == then for name, then in before.items()) >= 5


def test_the_number_of_ranks_changes_by_way_of_a_run_without(job: Job) -> None:
    assert job.run("--worker", "0/2").exit_code == 0
    with job.start() as process:
        while (job.destination / ".kconvert" / "ranks").exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)

    run_in_turn(job, 3)

    close(job)


def test_a_run_without_ranks_waits_for_no_rank_at_work(job: Job) -> None:
    with start(job, "1/2") as rank:
        wait_for(job, 1, 1, rank)
        job.check_error(job.run(), "another kconvert is writing")
        job.check_error(run_command("finalize", job.destination), "kconvert is at work")
        assert rank.wait() == 0


def test_a_rank_does_not_join_a_run_without(job: Job) -> None:
    with job.start() as process:
        while not job.records and process.poll() is None:
            time.sleep(0.001)
        job.check_error(job.run("--worker", "0/2"), "another kconvert is writing")
        assert process.wait() == 0
    job.check_finished()


def test_overwriting_clears_what_ranks_of_another_plan_have_begun(job: Job) -> None:
    assert run_command(*job.arguments, "--exclude", "*.experts.0.*", "--worker", "0/2").exit_code == 0
    job.check_error(job.run(), "other settings", "--overwrite")

    job.check_rerun_finishes("--overwrite")


def test_a_rank_that_comes_after_the_closing_changes_nothing(job: Job) -> None:
    run_in_turn(job, 2)
    close(job)

    for index in range(2):
        result = job.run("--worker", f"{index}/2", "--finalize-when-complete")
        assert result.exit_code == 0
        assert "nothing left to do" in result.output
    job.check_finished()
    assert "closed already" in run_command("finalize", job.destination).output


def test_a_finished_directory_that_lost_a_shard_is_mended_by_ranks(job: Job) -> None:
    assert job.run().exit_code == 0
    (job.destination / job.shards[0]).unlink()

    for index in (1, 0):
        assert job.run("--worker", f"{index}/2").exit_code == 0

    close(job)


def test_foreign_content_is_refused_by_ranks_too(job: Job) -> None:
    job.destination.mkdir()
    (job.destination / "notes.txt").write_text("mine")

    job.check_error(job.run("--worker", "0/2"), "not empty", "notes.txt")
    assert os.listdir(job.destination) == ["notes.txt"]


# Closing what is not for it.


@pytest.mark.parametrize("command", ["verify", "launch"])
def test_whoever_uses_a_directory_of_ranks_too_early_is_told_to_close_it(job: Job, command: str) -> None:
    run_in_turn(job, 2)

    arguments = [job.source, job.destination] if command == "verify" else [job.destination, "--engine", "vllm"]
    result = run_command(command, *arguments)

    assert result.exit_code in (1, 2)
    assert f"kconvert finalize {job.destination}" in result.stderr


def test_what_no_rank_has_written_is_not_closed(job: Job, tmp_path: Path) -> None:
    job.check_error(run_command("finalize", tmp_path / "nowhere"), "no directory that ranks have written to")
    job.check_error(run_command("finalize", job.source.parent), "no directory that ranks have written to")


def test_an_unfinished_run_without_ranks_is_not_closed(job: Job) -> None:
    with job.start() as process:
        while job.records < 2 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)

    job.check_error(run_command("finalize", job.destination), "unfinished, and not by ranks")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"head": 1}', "[" * 100_000])
def test_an_outline_that_is_rubbish(job: Job, text: str) -> None:
    assert job.run("--worker", "0/2").exit_code == 0
    (job.destination / ".kconvert" / "ranks" / "plan.json").write_text(text)

    for result in (job.run("--worker", "1/2"), run_command("finalize", job.destination), job.run()):
        job.check_error(result, "plan.json is not what kconvert wrote")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "", "a/../../b", "\0"])
def test_an_outline_that_leads_elsewhere(job: Job, name: str) -> None:
    run_in_turn(job, 2)
    path = job.destination / ".kconvert" / "ranks" / "plan.json"
    outline = json.loads(path.read_text())
    outline["small"].append(name)
    path.write_text(json.dumps(outline))

    job.check_error(run_command("finalize", job.destination), "plan.json is not what kconvert wrote")


@pytest.mark.parametrize(
    ("at", "value"), [("ranks", 0), ("ranks", 10**12), ("ranks", -1), (1, -5), (2, -1), (2, 10**15)]
)
def test_an_outline_of_sizes_that_cannot_be(job: Job, at: str | int, value: int) -> None:
    assert job.run("--worker", "0/2").exit_code == 0
    path = job.destination / ".kconvert" / "ranks" / "plan.json"
    outline = json.loads(path.read_text())
    if isinstance(at, str):
        outline[at] = value
    else:
        outline["shards"][0][at] = value
    path.write_text(json.dumps(outline))

    job.check_error(run_command("finalize", job.destination), "plan.json is not what kconvert wrote")


# What a rank is told, and tells.


def test_a_plain_command_within_a_launcher_is_no_rank(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "RANK", "JOB_COMPLETION_INDEX"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")

    job.check_rerun_finishes()


@pytest.mark.parametrize("launcher", ["slurm", "torchrun", "kubernetes"])
@pytest.mark.parametrize("asked", ["auto", ""])
def test_a_launcher_says_which_rank_this_is(launcher: str, asked: str) -> None:
    names = {
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
        "torchrun": ("RANK", "WORLD_SIZE"),
        "kubernetes": ("JOB_COMPLETION_INDEX", "JOB_COMPLETION_COUNT"),
    }[launcher]

    assert Rank.parse(asked or launcher, dict(zip(names, ("3", "8"), strict=True))) == Rank(3, 8)


def test_torchrun_within_slurm_must_be_told_apart() -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "RANK": "5", "WORLD_SIZE": "8"}

    assert Rank.parse("torchrun", environment) == Rank(5, 8)
    with pytest.raises(KconvertError, match="slurm 0/2 and torchrun 5/8; give --worker slurm or --worker torchrun"):
        Rank.parse("auto", environment)
    assert Rank.parse("auto", {**environment, "RANK": "0", "WORLD_SIZE": "2"}) == Rank(0, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3", "is no rank; give I/N"),
        ("", "is no rank"),
        ("a/b", "whole numbers"),
        ("-1/4", "whole numbers"),
        ("1/2/3", "whole numbers"),
        ("1.0/2", "whole numbers"),
        ("\u0663/8", "whole numbers"),
        ("4/4", "the ranks of 4 are 0 to 3"),
        ("0/0", "there are 1 to"),
        ("0/999999999", "there are 1 to"),
        ("slurm", "SLURM_PROCID, which is not set; start the command with srun"),
        ("kubernetes", "JOB_COMPLETION_INDEX, which is not set"),
        ("auto", "finds none of SLURM_PROCID, RANK, JOB_COMPLETION_INDEX"),
    ],
)
def test_a_rank_that_makes_no_sense(job: Job, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    for name in ("SLURM_PROCID", "RANK", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)

    job.check_error(job.run("--worker", text), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--push", "me/out", "--worker", "0/2"), "ranks cannot send to the Hub"),
        (("--overwrite", "--worker", "0/2"), "ranks replace nothing"),
        (("--finalize-when-complete",), "give --worker"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_ranks_do_not_do(job: Job, options: tuple[str, ...], words: str, dry: tuple[str, ...]) -> None:
    job.check_error(job.run(*options, *dry), words)
    assert not job.destination.exists()


def test_a_dry_run_says_which_shards_are_the_ranks(job: Job) -> None:
    result = job.run("--worker", "1/3", "--dry-run", "--json")

    share = json.loads(result.output)["share"]
    assert (share["rank"], share["ranks"]) == (1, 3)
    assert 0 < len(share["shards"]) < len(json.loads(result.output)["shards"])
    assert "rank 1 of 3: " in job.run("--worker", "1/3", "--dry-run").output
    assert not job.destination.exists()


def test_a_rank_says_what_it_wrote_and_what_comes_next(job: Job) -> None:
    said = job.run("--worker", "0/2").output
    last = json.loads(job.run("--worker", "1/2", "--finalize-when-complete", "--json").output)

    assert f"when all ranks have ended: kconvert finalize {job.destination}" in said
    assert (last["rank"], last["ranks"], last["complete"]) == (1, 2, True)


def test_a_disk_that_cannot_hold_what_all_ranks_will_write(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's own share would fit."""
    whole = sum(map(len, job.whole.values()))
    monkeypatch.setattr("kconvert.run.disk.free_bytes", lambda directory: whole // 2)

    job.check_error(job.run("--worker", "0/4"), "needs", "free some space")
