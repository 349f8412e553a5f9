"""What a manifest can say, on a model of a few names."""

from __future__ import annotations

from typing import Any

import pytest

from kconvert import KconvertError
from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.models.catalogue import parse
from kconvert.models.manifest import Manifest

CONFIG = {"num_hidden_layers": 4, "num_nextn_predict_layers": 2, "num_experts": 3, "hidden_size": 8}


def manifest(**table: Any) -> Manifest:
    usual = {
        "name": "toy",
        "dims": {
            "layers": "num_hidden_layers",
            "mtp": "num_nextn_predict_layers",
            "experts": "num_experts",
            "hidden": "hidden_size",
        },
        "indices": {"layer": ["0", "layers"], "expert": ["0", "experts"]},
    }
    return parse({**usual, **table, "indices": {**usual["indices"], **table.get("indices", {})}})


def norm(name: str, **more: Any) -> dict[str, Any]:
    return {"role": "norm", "name": name, "dtype": "BF16", "shape": ["hidden"], **more}


def names(manifest: Manifest, **config: Any) -> dict[str, int | None]:
    return {name: match.layer for name, match in manifest.bind({**CONFIG, **config}).expected()}


@pytest.mark.parametrize(
    ("index", "kinds", "layers"),
    [
        ({"equal": "full"}, ["full", "shared", "full"], {0, 2}),
        ({"unequal": "shared"}, ["full", "shared", "full"], {0, 2, 3}),
        ({"unequal": "shared"}, None, {0, 1, 2, 3}),
        ({"equal": "full"}, None, set()),
        ({"equal": 4}, [0, 4, 128, 4, 4, 4], {1, 3}),
        ({"unequal": 0}, [0, 4, 128, 4, 4, 4], {1, 2, 3}),
    ],
)
def test_layers_of_a_kind_are_told_by_a_list_with_an_entry_for_each(
    index: dict[str, Any], kinds: list[Any] | None, layers: set[int]
) -> None:
    of_kind = {"range": ["0", "layers"], "list": "kinds", **index}
    toy = manifest(tensors=[norm("layers.{layer.kind}.norm")], indices={"layer.kind": of_kind})
    assert set(names(toy, kinds=kinds).values()) == layers


@pytest.mark.parametrize("kinds", ["full", {"0": "full"}, 3])
def test_a_list_of_kinds_that_is_none_is_refused(kinds: Any) -> None:
    of_kind = {"range": ["0", "layers"], "list": "kinds", "equal": "full"}
    toy = manifest(tensors=[norm("layers.{layer.kind}.norm")], indices={"layer.kind": of_kind})
    with pytest.raises(KconvertError, match="kinds is not a list of layers"):
        names(toy, kinds=kinds)


@pytest.mark.parametrize("layers", [[1, 3], "1,3", "1, 3"])
def test_a_list_of_layers_may_be_a_text(layers: Any) -> None:
    toy = manifest(tensors=[norm("layers.{layer.moe}.norm")], indices={"layer.moe": {"list": "moe"}})
    assert set(names(toy, moe=layers).values()) == {1, 3}
    assert names(toy, moe="") == {}
    with pytest.raises(KconvertError, match="moe is not a list of layers"):
        names(toy, moe="1,x")


def test_layers_with_a_root_of_their_own_count_from_another_number_in_their_names() -> None:
    mtp = {"range": ["layers", "layers + mtp"], "named_from": "layers"}
    toy = manifest(tensors=[norm("mtp.{layer.mtp}.norm")], indices={"layer.mtp": mtp})
    assert names(toy) == {"mtp.0.norm": 4, "mtp.1.norm": 5}


def test_a_name_without_a_layer_may_belong_to_one_and_is_missing_only_with_it() -> None:
    mtp = {"range": ["layers", "layers + mtp"], "named_from": "layers"}
    toy = manifest(
        tensors=[norm("norm"), norm("mtp.{layer.mtp}.norm"), norm("mtp.fc", layer="layer.mtp")],
        indices={"layer.mtp": mtp},
        optional_layers="layer.mtp",
    )
    bound = toy.bind(CONFIG)
    assert names(toy) == {"norm": None, "mtp.0.norm": 4, "mtp.1.norm": 5, "mtp.fc": 4}
    assert bound.missing({"norm"}) == []
    assert bound.missing({"norm", "mtp.0.norm"}) == ["mtp.fc"]
    assert names(toy, num_nextn_predict_layers=0) == {"norm": None}


def test_sizes_lie_in_lists_too() -> None:
    toy = manifest(
        tensors=[{"role": "table", "name": "table", "dtype": "BF16", "shape": ["count", "second"]}],
        dims={"layers": "num_hidden_layers", "experts": "num_experts", "count": "rows.length", "second": "rows.1"},
    )
    assert dict(toy.bind({**CONFIG, "rows": [7, 9, 11]}).expected())["table"].shape == (3, 9)
    with pytest.raises(KconvertError, match=r"rows\.1 is missing"):
        toy.bind({**CONFIG, "rows": [7]})


def test_stacks_are_bound_to_the_experts_in_them_one_after_the_other() -> None:
    name = "layers.{layer}.experts"
    stacks = [{"name": f"{name}.both", "of": [f"{name}.{{expert}}.gate", f"{name}.{{expert}}.up"], "bare": True}]
    bound = manifest(stacks=stacks).bind(CONFIG).stacks
    assert list(bound) == [f"layers.{layer}.experts.both" for layer in range(4)]
    one = bound["layers.2.experts.both"]
    assert one.members == tuple(f"layers.2.experts.{expert}.{part}" for expert in range(3) for part in ("gate", "up"))
    assert (one.bare, one.plain) == (True, False)


def test_tensors_that_are_called_otherwise_are_spelt_as_the_manifest_says() -> None:
    toy = manifest(spelling={"fp8": {"scale_name": "scale", "scale_dtype": "F8_E8M0"}})
    assert toy.spell(Fp8()) == Fp8(scale_name="scale", scale_dtype="F8_E8M0")
    assert toy.spell(Dense("BF16")) == Dense("BF16")


def test_a_checkpoint_may_have_the_other_names_that_the_manifest_knows() -> None:
    toy = manifest(tensors=[norm("model.layers.{layer}.norm"), norm("head")], also={"model.layers.": "layers."})
    other = toy.respelt(["layers.0.norm", "head"])
    assert set(names(other)) == {"head", *(f"layers.{layer}.norm" for layer in range(4))}
    for usual in (["model.layers.0.norm", "layers.0.norm"], ["head"], []):
        assert toy.respelt(usual) is toy


def test_a_smaller_model_keeps_the_entries_of_the_layers_it_has_and_of_those_behind_the_last() -> None:
    toy = manifest(per_layer=["kinds"])
    resized = toy.resize({**CONFIG, "kinds": ["a", "b", "c", "d", "mtp 0", "mtp 1"]}, {"layers": 2})
    assert resized["kinds"] == ["a", "b", "mtp 0", "mtp 1"]


@pytest.mark.parametrize(("moe", "left"), [([1, 2, 3], [1, 2]), ("1,2,3", "1,2")])
def test_a_smaller_model_loses_the_layers_of_a_list_that_it_does_not_have(moe: Any, left: Any) -> None:
    toy = manifest(indices={"layer.moe": {"list": "moe"}}, limits={"moe": "layers - 1"})
    assert toy.resize({**CONFIG, "moe": moe}, {"layers": 3})["moe"] == left


def test_a_smaller_model_has_as_many_other_numbers_and_none_too_large() -> None:
    toy = manifest(limits={"targets": "layers - 1", "eos.length": "layers"})
    resized = toy.resize({**CONFIG, "targets": [1, 2, 3], "eos": [5, 6, 7]}, {"layers": 2})
    assert (resized["targets"], resized["eos"]) == ([1, 1, 1], [5, 6])


def test_a_number_that_must_divide_becomes_the_next_smaller_one_that_does() -> None:
    toy = manifest(divisors={"groups": "layers"})
    assert [toy.resize({**CONFIG, "groups": 4}, {"layers": n})["groups"] for n in (8, 6, 3, 5, 1)] == [4, 3, 3, 1, 1]
    assert toy.resize({**CONFIG, "groups": None}, {"layers": 3})["groups"] is None


def test_a_size_that_another_stands_in_for_is_changed_where_it_is() -> None:
    dims = {"layers": "num_hidden_layers", "nextn": "num_nextn_predict_layers", "mtp": "targets.length"}
    toy = manifest(dims=dims, defaults={"mtp": "nextn"}, indices={"expert": ["0", "0"]})
    assert toy.resize(CONFIG, {"mtp": 0}) == {**CONFIG, "num_nextn_predict_layers": 0}
    assert toy.resize({**CONFIG, "targets": [1, 2]}, {"mtp": 1}) == {**CONFIG, "targets": [1]}
