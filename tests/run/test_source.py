"""Sources that break, shrink or change while they are read, and damage that is found before anything is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import Result

if TYPE_CHECKING:
    from .conftest import Job, Tap

LAST_WEIGHT = "model.layers.2.mlp.experts.3.up_proj"
Edit = Callable[[Any], None]


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
def test_a_read_error_names_the_file_and_the_rerun_completes(
    fragile: Job, broken: Callable[..., AbstractContextManager[Tap]], moment: float
) -> None:
    with broken("preadv", errno.EIO, fragile.source, moment) as disk:
        result = fragile.run()

    assert disk.calls > 0
    fragile.check_error(result, str(fragile.source / "model-"), ".safetensors", "cannot read", os.strerror(errno.EIO))
    fragile.check_no_half_files()
    assert "config.json" not in fragile.files
    fragile.check_rerun_finishes()


def cut_in_the_middle(job: Job, tap: Callable[..., AbstractContextManager[Tap]]) -> tuple[Result, Path, bytes]:
    """Truncate the source's last shard once writing has begun."""
    shard = sorted(job.source.glob("*.safetensors"))[-1]
    content = shard.read_bytes()

    def cut(call: int) -> None:
        if call == 1:
            os.truncate(shard, len(content) // 4)

    with tap("pwrite", job.destination, cut):
        return job.run("--threads", 1), shard, content


def test_a_source_file_that_shrinks_meanwhile_is_named(
    fragile: Job, tap: Callable[..., AbstractContextManager[Tap]]
) -> None:
    result, shard, _ = cut_in_the_middle(fragile, tap)

    fragile.check_error(result, str(shard), "shrank")
    assert fragile.shards
    fragile.check_no_half_files()
    assert "config.json" not in fragile.files


def test_a_shrunken_source_file_that_is_restored_lets_the_rerun_complete(
    fragile: Job, tap: Callable[..., AbstractContextManager[Tap]]
) -> None:
    modified = {path: path.stat().st_mtime_ns for path in fragile.source.glob("*.safetensors")}
    _, shard, content = cut_in_the_middle(fragile, tap)
    kept = fragile.records
    assert kept

    shard.write_bytes(content)
    os.utime(shard, ns=(modified[shard], modified[shard]))
    fragile.check_rerun_finishes()


def test_a_shrunken_source_file_is_refused_by_the_rerun(
    fragile: Job, tap: Callable[..., AbstractContextManager[Tap]]
) -> None:
    _, shard, _ = cut_in_the_middle(fragile, tap)

    fragile.check_error(fragile.run(), str(shard), "truncated")


def test_of_a_source_with_another_file_since_the_interruption_what_comes_from_the_rest_is_kept(
    fragile: Job, broken: Callable[..., AbstractContextManager[Tap]]
) -> None:
    with broken("posix_fallocate", errno.ENOSPC, fragile.destination, 0.9):
        assert fragile.run("--threads", 1).exit_code == 2
    before = {name: (fragile.destination / name).stat().st_mtime_ns for name in fragile.shards}
    first = min(fragile.source.glob("*.safetensors"))
    os.utime(first, ns=(1, 1))
    made = set(fragile.shards_of(first.name))

    assert fragile.run().exit_code == 0
    kept = {name for name, mtime in before.items() if (fragile.destination / name).stat().st_mtime_ns == mtime}
    assert kept == before.keys() - made
    assert kept
    assert fragile.files == fragile.whole


@pytest.mark.parametrize("worker", [(), ("--worker", "0/1")], ids=["alone", "a rank"])
def test_a_source_file_that_is_written_anew_meanwhile_is_named_and_what_it_went_into_made_again(
    fragile: Job, tap: Callable[..., AbstractContextManager[Tap]], worker: tuple[str, ...]
) -> None:
    changed = sorted(fragile.source.glob("*.safetensors"))[-1]

    def write_again(call: int) -> None:
        if call == 1:
            with open(changed, "rb+") as file:
                file.seek(-2, os.SEEK_END)
                file.write(b"??")  # of the last tensor, as long as it was

    whole = changed.read_bytes()
    with tap("pwrite", fragile.destination, write_again):
        fragile.check_error(fragile.run("--threads", 1, *worker), str(changed), "changed while it was being read")
    assert "config.json" not in fragile.files
    finished = {name: (fragile.destination / name).stat().st_mtime_ns for name in fragile.shards}

    changed.write_bytes(whole)
    fragile.check_rerun_finishes()
    made = set(fragile.shards_of(changed.name))
    kept = {name for name, mtime in finished.items() if (fragile.destination / name).stat().st_mtime_ns == mtime}
    assert kept == finished.keys() - made
    assert kept


def test_a_source_that_has_changed_since_the_output_was_finished_is_refused(fragile: Job) -> None:
    assert fragile.run().exit_code == 0
    os.utime(next(fragile.source.glob("*.safetensors")), ns=(1, 1))
    before = fragile.files

    fragile.check_error(fragile.run(), str(fragile.destination), "changed", "--overwrite")

    assert fragile.files == before
    fragile.check_rerun_finishes("--overwrite")


# What is found before anything is written.


def infinite_scale(checkpoint: Any) -> None:
    poke(checkpoint[f"{LAST_WEIGHT}.weight_scale"], 6, struct.pack("<H", 0x7F80))


def nan_scale(checkpoint: Any) -> None:
    poke(checkpoint[f"{LAST_WEIGHT}.weight_scale"], 6, struct.pack("<H", 0xFFC1))


def wrong_shape(checkpoint: Any) -> None:
    checkpoint[f"{LAST_WEIGHT}.weight_shape"].data = struct.pack("<2i", 256, 128)


def missing_scale(checkpoint: Any) -> None:
    checkpoint.pop(f"{LAST_WEIGHT}.weight_scale")


def missing_codes(checkpoint: Any) -> None:
    checkpoint.pop(f"{LAST_WEIGHT}.weight_packed")


def too_few_groups(checkpoint: Any) -> None:
    scale = checkpoint[f"{LAST_WEIGHT}.weight_scale"]
    scale.shape, scale.data = [scale.shape[0], 1], scale.data[: scale.shape[0] * 2]


def too_few_rows(checkpoint: Any) -> None:
    scale = checkpoint[f"{LAST_WEIGHT}.weight_scale"]
    scale.shape, scale.data = [1, scale.shape[1]], scale.data[: scale.shape[1] * 2]


def leftover(checkpoint: Any) -> None:
    scale = checkpoint[f"{LAST_WEIGHT}.weight_scale"]
    checkpoint.put(f"{LAST_WEIGHT}.weight_mystery", scale, checkpoint.file_of(f"{LAST_WEIGHT}.weight_scale"))


def poke(tensor: Any, position: int, data: bytes) -> None:
    tensor.data = tensor.data[:position] + data + tensor.data[position + len(data) :]


VALUES: list[tuple[Edit, list[str]]] = [
    (infinite_scale, ["weight_scale", "not finite", "[0, 3]"]),
    (nan_scale, ["weight_scale", "not finite", "[0, 3]"]),
    (wrong_shape, ["weight_shape", "[256, 128]", "[128, 256]"]),
]


def break_last_weight(job: Job, raw: Any, damage: Edit) -> str:
    """The file that has the last weight, which is damaged now."""
    checkpoint = raw.load(job.source)
    damage(checkpoint)
    checkpoint.save()
    return str(checkpoint.file_of(f"{LAST_WEIGHT}.weight_scale"))


@pytest.mark.parametrize(("damage", "names"), VALUES, ids=lambda value: getattr(value, "__name__", ""))
def test_with_check_first_a_bad_value_in_the_last_layer_is_found_before_anything_is_written(
    fragile: Job, raw: Any, damage: Edit, names: list[str]
) -> None:
    file = break_last_weight(fragile, raw, damage)

    fragile.check_error(fragile.run("--check-first"), file, LAST_WEIGHT, *names)
    assert not fragile.destination.exists()


@pytest.mark.parametrize(("damage", "names"), VALUES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_value_met_late_leaves_what_is_finished_and_a_rerun_starts_there(
    fragile: Job, raw: Any, damage: Edit, names: list[str], tmp_path: Path
) -> None:
    raw.load(fragile.source).save()  # as the same tool writes it that damages it
    sound = shutil.copytree(fragile.source, tmp_path / "sound")
    file = break_last_weight(fragile, raw, damage)
    for path in sound.glob("*.safetensors"):
        if path.name != file:
            shutil.copystat(path, fragile.source / path.name)

    fragile.check_error(fragile.run("--threads", "1"), file, LAST_WEIGHT, *names)
    finished = {path.name: path.stat().st_mtime_ns for path in fragile.destination.glob("*.safetensors")}
    assert finished
    assert not (fragile.destination / "config.json").exists()
    fragile.check_no_half_files()

    shutil.copy2(sound / file, fragile.source / file)
    again = fragile.run()
    assert again.exit_code == 0, again.output
    assert "that were missing" in again.output
    kept = {name for name, mtime in finished.items() if (fragile.destination / name).stat().st_mtime_ns == mtime}
    assert kept == finished.keys() - set(fragile.shards_of(file))
    assert kept


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (missing_scale, ["weight_scale"]),
        (missing_codes, ["weight_packed"]),
        (too_few_groups, ["weight_scale", "[128, 1]", "[128, 8]"]),
        (too_few_rows, ["weight_scale", "[1, 8]", "[128, 8]"]),
        (leftover, ["weight_mystery"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_in_the_last_layer_is_found_before_anything_is_written(
    fragile: Job, raw: Any, damage: Edit, names: list[str]
) -> None:
    checkpoint = raw.load(fragile.source)
    file = checkpoint.file_of(f"{LAST_WEIGHT}.weight_scale")
    damage(checkpoint)
    checkpoint.save()

    result = fragile.run()

    fragile.check_error(result, file, LAST_WEIGHT, *names)
    assert not fragile.destination.exists()


def test_a_shard_that_the_index_names_and_the_disk_lacks_is_named(fragile: Job, raw: Any) -> None:
    shard = raw.load(fragile.source).file_of(f"{LAST_WEIGHT}.weight_scale")
    (fragile.source / shard).unlink()

    fragile.check_error(fragile.run(), shard, "tensor")
    assert not fragile.destination.exists()


def test_a_weight_whose_shape_tensor_is_missing_is_converted_all_the_same(fragile: Job, raw: Any) -> None:
    checkpoint = raw.load(fragile.source)
    before = checkpoint.config
    checkpoint.pop(f"{LAST_WEIGHT}.weight_shape")
    checkpoint.save()
    assert checkpoint.config == before

    assert fragile.run().exit_code == 0
    assert [n for n in fragile.shards if fragile.files[n] != fragile.whole[n]] == []


def test_a_nested_quantization_config_is_gone_from_the_output(fragile: Job, raw: Any) -> None:
    checkpoint = raw.load(fragile.source)
    table = checkpoint.config.pop("quantization_config")
    checkpoint.config["text_config"] = {"quantization_config": table, "hidden_act": "silu"}
    checkpoint.save()

    assert fragile.run().exit_code == 0

    config = json.loads(fragile.files["config.json"])
    assert "quantization_config" not in config
    assert config["text_config"] == {"hidden_act": "silu"}
    assert [n for n in fragile.shards if fragile.files[n] != fragile.whole[n]] == []


def test_every_quantization_entry_is_gone_from_the_output(fragile: Job, raw: Any) -> None:
    checkpoint = raw.load(fragile.source)
    table = checkpoint.config["quantization_config"]
    checkpoint.config["compression_config"] = table
    checkpoint.config["text_config"] = {"quantization_config": table, "compression_config": table}
    checkpoint.save()

    assert fragile.run().exit_code == 0

    assert "quant" not in fragile.files["config.json"].decode()
    assert "compress" not in fragile.files["config.json"].decode()


def test_a_hub_cache_snapshot_gives_regular_files(fragile: Job, tmp_path: Path) -> None:
    home = tmp_path / "models--moonshotai--Kimi-K2-Thinking"
    snapshot = home / "snapshots" / "0123456789abcdef"
    (home / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in fragile.source.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(fragile.source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, home / "blobs" / f"{number:064x}")
        link.symlink_to(os.path.relpath(home / "blobs" / f"{number:064x}", link.parent))
    fragile.source = snapshot

    fragile.check_rerun_finishes()

    assert [path for path in fragile.destination.rglob("*") if path.is_symlink()] == []
