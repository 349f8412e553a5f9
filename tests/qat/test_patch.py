"""Rollouts that follow a training: what changed since the last export, merged into a copy of that, is a whole export."""

import json
import os
import shutil

import pytest
import torch

import kconvert
from kconvert.errors import KconvertError
from kconvert.run.state import merge
from kconvert_qat import QATConfig, detach, export, prepare
from kconvert_qat.export import encode
from kconvert_qat.grids.table import GRIDS


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def check_same(mine, wanted):
    """The same files, but for the number of the export in the index."""
    ours, theirs = files_of(mine), files_of(wanted)
    for files in (ours, theirs):
        index = json.loads(files["model.safetensors.index.json"])
        assert index["metadata"].pop("export")
        files["model.safetensors.index.json"] = index
    assert ours == theirs


def train(model, expert, layer=1, amount=1.1):
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj[expert] *= amount
        model.model.norm.weight[0] += 1


@pytest.fixture
def exported(tiny, tmp_path):
    """A prepared model, its export in `base`, and in `patch` what changed when one expert was trained."""
    model = tiny("qwen")
    prepare(model)
    export(model, tmp_path / "base", shard_size=20_000)
    train(model, 2)
    export(model, tmp_path / "patch", only_changed=True)
    return model


def test_a_patch_has_the_experts_that_changed_and_merged_it_is_a_whole_export(exported, tmp_path):
    patch = json.loads((tmp_path / "patch" / "patch.json").read_text())
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert patch["weight_map"].keys() == {f"{name}_packed", f"{name}_scale", f"{name}_shape", "model.norm.weight"}
    done = kconvert.apply(tmp_path / "base", tmp_path / "patch")
    assert (done.tensors, done.before) == (4, False)
    export(exported, tmp_path / "whole", shard_size=20_000)
    check_same(tmp_path / "base", tmp_path / "whole")


def test_the_command_says_what_it_did_and_refuses_in_one_sentence(kconvert, exported, tmp_path):
    base, patch = tmp_path / "base", tmp_path / "patch"
    done = kconvert("apply", base, patch, "--json")
    facts = {"output": str(base), "tensors": 4, "bytes": json.loads(done.stdout)["bytes"], "before": False}
    assert json.loads(done.stdout) == facts
    assert facts["bytes"] > 1000
    assert kconvert("apply", base, patch).stdout == f"{base} has it already\n"
    bad = kconvert("apply", patch, base)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert (
        bad.stderr
        == f"error: {base} has no patch.json, which is written last; it is no patch, or one that was not finished\n"
    )


def test_patches_are_applied_one_after_the_other_and_each_once(exported, tmp_path):
    shutil.copytree(tmp_path / "base", tmp_path / "late")
    for number, expert in enumerate((0, 2), 2):
        train(exported, expert)
        export(exported, tmp_path / f"patch{number}", only_changed=True)
    with pytest.raises(KconvertError, match="is a patch for another export"):
        kconvert.apply(tmp_path / "late", tmp_path / "patch2")
    before = files_of(tmp_path / "base")
    for name in ("patch", "patch2", "patch3"):
        assert not kconvert.apply(tmp_path / "late", tmp_path / name).before
        assert kconvert.apply(tmp_path / "late", tmp_path / name).before
    with pytest.raises(KconvertError, match="is a patch for another export"):
        kconvert.apply(tmp_path / "late", tmp_path / "patch")
    assert files_of(tmp_path / "base") == before
    export(exported, tmp_path / "whole", shard_size=20_000)
    check_same(tmp_path / "late", tmp_path / "whole")


def test_where_nothing_changed_a_patch_is_empty_and_makes_the_next_export(exported, tmp_path):
    export(exported, tmp_path / "none", only_changed=True)
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["patch.json"]
    kconvert.apply(tmp_path / "base", tmp_path / "patch")
    before = files_of(tmp_path / "base")
    kconvert.apply(tmp_path / "base", tmp_path / "none")
    after = files_of(tmp_path / "base")
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors.index.json"}


@pytest.mark.parametrize("grid", ["mxfp4", "nvfp4", "fp8-block"])
def test_patches_are_of_every_grid(tiny, tmp_path, grid):
    model = tiny("qwen")
    prepare(model, QATConfig(grid=grid))
    export(model, tmp_path / "base")
    train(model, 3, amount=3)
    export(model, tmp_path / "patch", only_changed=True)
    kconvert.apply(tmp_path / "base", tmp_path / "patch")
    export(model, tmp_path / "whole")
    check_same(tmp_path / "base", tmp_path / "whole")


@pytest.fixture
def spelt(monkeypatch):
    """The names of the weights that are encoded or copied, in order."""
    names, real = [], encode._spell

    def counting(step, value, rooms):
        names.append(step.name)
        real(step, value, rooms)

    monkeypatch.setattr(encode, "_spell", counting)
    return names


def test_only_what_changed_is_encoded(exported, tmp_path, spelt):
    train(exported, 1)
    export(exported, tmp_path / "next", only_changed=True)
    assert sorted(spelt) == ["model.layers.1.mlp.experts.1.down_proj", "model.norm.weight"]
    for number in range(2):
        spelt.clear()
        export(exported, tmp_path / f"none{number}", only_changed=True)
        assert not spelt


@pytest.mark.parametrize("grid", GRIDS)
def test_every_change_of_a_weight_is_in_the_next_patch(tiny, tmp_path, grid):
    """Of one value of any expert, in ways that torch does not count; of gate, whose number of the whole up shares, too."""
    model = tiny("qwen")
    prepare(model, QATConfig(grid=grid))
    export(model, tmp_path / "base")
    experts = model.model.layers[1].mlp.experts
    changes = [
        lambda: experts.gate_up_proj.data[2, 5, 7].fill_(9),
        lambda: experts.gate_up_proj.data[2, 5, 7].fill_(-9),
        lambda: experts.down_proj.data[0].copy_(experts.down_proj.data[1]),
        lambda: setattr(experts, "down_proj", torch.nn.Parameter(experts.down_proj.detach().flip(0))),
        lambda: model.lm_head.weight.data[-1, -1:].add_(1),
    ]
    for number, change in enumerate(changes):
        with torch.no_grad():
            change()
        plan = export(model, tmp_path / f"patch{number}", only_changed=True)
        assert plan.shards, number
        kconvert.apply(tmp_path / "base", tmp_path / f"patch{number}")
        export_apart(model, tmp_path / f"whole{number}")
        check_same(tmp_path / "base", tmp_path / f"whole{number}")


def export_apart(model, folder):
    """A whole export that the next patch does not follow."""
    remembered = vars(model)["_kconvert_exported"]
    export(model, folder)
    vars(model)["_kconvert_exported"] = remembered


def test_another_convention_is_another_encoding_of_every_expert(exported, tmp_path):
    detach(exported)
    prepare(exported, QATConfig(convention="compressed-tensors"))
    export(exported, tmp_path / "next", only_changed=True)
    for name in ("patch", "next"):
        kconvert.apply(tmp_path / "base", tmp_path / name)
    export(exported, tmp_path / "whole", shard_size=20_000)
    assert tensors(tmp_path / "base") == tensors(tmp_path / "whole")


def tensors(folder):
    return {name: data for name, data in files_of(folder).items() if name.endswith(".safetensors")}


def test_a_patch_in_small_files_is_the_same(exported, tmp_path):
    shutil.rmtree(tmp_path / "patch")
    with torch.no_grad():
        exported.model.layers[0].mlp.experts.gate_up_proj *= 1.1
    kept = shutil.copytree(tmp_path / "base", tmp_path / "copy")
    export(exported, kept, shard_size=20_000, overwrite=True)
    with torch.no_grad():
        exported.model.layers[1].mlp.experts.gate_up_proj *= 1.1
    plan = export(exported, tmp_path / "patch", only_changed=True, shard_size=3_000)
    assert len(plan.shards) > 2
    assert {path.stat().st_size for path in (tmp_path / "patch").glob("*.safetensors")} == {
        it.nbytes for it in plan.shards
    }
    kconvert.apply(kept, tmp_path / "patch")
    export(exported, tmp_path / "whole", shard_size=20_000)
    check_same(kept, tmp_path / "whole")


CALLS = ("mkdir", "write_file", "replace", "fsync", "write_at", "rmtree")


class Killed(BaseException):
    pass


def killed_at(monkeypatch, count):
    """The merge ends without a word before its call number `count` to what changes the disk; the number of those there were."""
    calls = []

    def counting(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) == count:
                raise Killed
            return function(*arguments, **options)

        return call

    for home, name in (
        (merge, "write_file"),
        (merge, "write_at"),
        (merge, "sync_directory"),
        (os, "replace"),
        (os, "fsync"),
    ):
        monkeypatch.setattr(home, name, counting(getattr(home, name)))
    return calls


def test_killed_anywhere_a_merge_never_looks_whole_unless_it_is_and_goes_on(exported, tmp_path, monkeypatch):
    base, patch = tmp_path / "base", tmp_path / "patch"
    export(exported, tmp_path / "whole", shard_size=20_000)
    before, count, ended = files_of(base), 0, False
    while not ended:
        count += 1
        folder = shutil.copytree(base, tmp_path / f"killed{count}")
        with monkeypatch.context() as patched:
            killed_at(patched, count)
            try:
                kconvert.apply(folder, patch)
                ended = True
            except Killed:
                pass
        if (folder / "config.json").exists():
            whole = files_of(folder) == before
            if not whole:
                check_same(folder, tmp_path / "whole")
        kconvert.apply(folder, patch)
        check_same(folder, tmp_path / "whole")
        assert not (folder / ".kconvert" / "merge").exists()
        shutil.rmtree(folder)
    assert count > 8


def test_half_merged_another_patch_is_refused(exported, tmp_path, monkeypatch):
    train(exported, 0)
    export(exported, tmp_path / "next", only_changed=True)
    with monkeypatch.context() as patched:
        killed_at(patched, 8)
        with pytest.raises(Killed):
            kconvert.apply(tmp_path / "base", tmp_path / "patch")
    assert not (tmp_path / "base" / "config.json").exists()
    with pytest.raises(KconvertError, match="half-merged with another patch"):
        kconvert.apply(tmp_path / "base", tmp_path / "next")
    for name in ("patch", "next"):
        kconvert.apply(tmp_path / "base", tmp_path / name)


def test_an_export_into_a_half_merged_directory_forgets_the_merge(exported, tmp_path, monkeypatch):
    base = tmp_path / "base"
    with monkeypatch.context() as patched:
        killed_at(patched, 8)
        with pytest.raises(Killed):
            kconvert.apply(base, tmp_path / "patch")
    with torch.no_grad():
        exported.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    with pytest.raises(KconvertError, match="not finite"):  # and is not finished
        export(exported, base, shard_size=20_000, overwrite=True)
    with pytest.raises(KconvertError, match=r"has no model\.safetensors\.index\.json"):
        kconvert.apply(base, tmp_path / "patch")
    assert not (base / "config.json").exists()


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FILE = "patch-00001.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base, patch: (patch / "patch.json").unlink(), "has no patch.json"),
        (lambda base, patch: (patch / "patch.json").write_text("[]"), "is not a JSON object"),
        (lambda base, patch: edited(patch / "patch.json", sha256={"../x": "0"}), "is not what an export writes"),
        (lambda base, patch: edited(patch / "patch.json", weight_map={}), "lists other tensors"),
        (lambda base, patch: damage(patch / FILE), f"{FILE} is not as it was written"),
        (lambda base, patch: (patch / FILE).unlink(), f"{FILE} is missing"),
        (lambda base, patch: shutil.rmtree(patch), "is no directory"),
        (lambda base, patch: shutil.rmtree(base), "is no directory"),
        (lambda base, patch: (base / "model.safetensors.index.json").unlink(), "has no model.safetensors.index.json"),
        (lambda base, patch: (base / "config.json").unlink(), "has no config.json"),
        (lambda base, patch: next(base.glob("model*-of-*")).unlink(), "is missing"),
        (
            lambda base, patch: os.link(sorted(base.glob("model*-of-*"))[-1], base.parent / "other"),
            "is linked from elsewhere",
        ),
    ],
)
def test_what_cannot_be_merged_is_one_sentence_and_nothing_is_written(exported, tmp_path, change, message):
    base, patch = tmp_path / "base", tmp_path / "patch"
    shards = sorted(base.glob("model*-of-*"))
    change(base, patch)
    if message == "is missing":
        for shard in shards:
            shard.unlink(missing_ok=True)
    before = files_of(base) if base.exists() else None
    with pytest.raises(KconvertError, match=message) as said:
        kconvert.apply(base, patch)
    assert "\n" not in str(said.value)
    assert (files_of(base) if base.exists() else None) == before


def test_a_checkpoint_that_is_no_export_is_refused(exported, tmp_path):
    exported.save_pretrained(tmp_path / "plain", max_shard_size="50KB")
    with pytest.raises(KconvertError, match="is a patch for another export"):
        kconvert.apply(tmp_path / "plain", tmp_path / "patch")


def test_a_patch_follows_an_export_of_the_same_model(tiny, tmp_path):
    model = tiny("qwen")
    prepare(model)
    with pytest.raises(KconvertError, match="export it whole first"):
        export(model, tmp_path / "patch", only_changed=True)
    export(model, tmp_path / "base")
    model.config.vocab_size -= 8
    model.resize_token_embeddings(120)
    with pytest.raises(KconvertError, match="has other tensors, or another encoding"):
        export(model, tmp_path / "patch", only_changed=True)


def test_a_patch_needs_a_directory_of_its_own_and_may_replace_another(exported, tmp_path):
    with pytest.raises(KconvertError, match=r"base is not empty \(\.kconvert\)"):
        export(exported, tmp_path / "base", only_changed=True, overwrite=True)
    with pytest.raises(KconvertError, match=r"patch is not empty \(patch"):
        export(exported, tmp_path / "patch", only_changed=True)
    export(exported, tmp_path / "patch", only_changed=True, overwrite=True)
    assert [path.name for path in (tmp_path / "patch").iterdir()] == ["patch.json"]


def test_a_weight_that_is_not_finite_leaves_no_patch_and_the_next_one_has_everything(exported, tmp_path):
    with torch.no_grad():
        exported.model.layers[0].mlp.experts.down_proj[1] *= 1.1
        value = exported.model.layers[1].mlp.experts.down_proj[3, 0, 0].clone()
        exported.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    with pytest.raises(KconvertError, match=r"experts\.3\.down_proj.*not finite"):
        export(exported, tmp_path / "bad", only_changed=True)
    assert not (tmp_path / "bad" / "patch.json").exists()
    with torch.no_grad():
        exported.model.layers[1].mlp.experts.down_proj[3, 0, 0] = value
    export(exported, tmp_path / "good", only_changed=True)
    for name in ("patch", "good"):
        kconvert.apply(tmp_path / "base", tmp_path / name)
    export(exported, tmp_path / "whole", shard_size=20_000)
    check_same(tmp_path / "base", tmp_path / "whole")
