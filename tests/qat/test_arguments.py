"""What is no model, no path, no device or no number is refused in one sentence, by every function that one can call."""

from pathlib import Path

import pytest
import torch

import kconvert
from kconvert.errors import KconvertError
from kconvert_qat import QATConfig, at_step, coverage, detach, export, load, prepare

SENTENCE = r"^[^\n]+$"


@pytest.fixture
def exported(tiny, tmp_path):
    """A prepared model, and where it was exported."""
    model = tiny("qwen")
    prepare(model)
    export(model, tmp_path / "int4")
    return model, tmp_path / "int4"


@pytest.mark.parametrize("bad", [None, 3, "model", Path()], ids=repr)
def test_what_is_no_model_is_refused(bad, tmp_path):
    for call in (prepare, coverage, detach, lambda it: at_step(it, 0)):
        with pytest.raises(KconvertError, match=rf"^a model is a torch.nn.Module, and this is {type(bad).__name__}$"):
            call(bad)
    for call in (export, load):
        with pytest.raises(KconvertError, match="a model is"):
            call(bad, tmp_path / "none")


@pytest.mark.parametrize("bad", [3, "int4", {}, {"grid": "int4"}, QATConfig], ids=repr)
def test_what_is_no_configuration_is_refused_and_nothing_is_prepared(tiny, bad):
    model = tiny("qwen")
    with pytest.raises(KconvertError, match=r"^prepare takes a QATConfig, and"):
        prepare(model, bad)
    assert prepare(model, None).config == QATConfig()


@pytest.mark.parametrize("bad", [None, "1", 1.5, -1, True], ids=repr)
def test_what_is_no_step_is_refused(exported, bad):
    with pytest.raises(KconvertError, match=r"^the step is"):
        at_step(exported[0], bad)


@pytest.mark.parametrize(
    "bad", ["nonsense", None, "cpu:x", 10**6, "meta", object()], ids=["x", "none", "cpu:x", "n", "meta", "o"]
)
def test_a_device_that_is_not_there_or_holds_no_values_is_refused(exported, tiny, bad):
    with pytest.raises(KconvertError, match="device"):
        load(tiny("qwen"), exported[1], device=bad)


@pytest.mark.parametrize("bad", [None, 3, b"int4", ["int4"]], ids=repr)
def test_what_is_no_path_is_refused(exported, tiny, tmp_path, bad):
    model, there = exported
    calls = [
        lambda: kconvert.open(bad),
        lambda: kconvert.inspect(bad),
        lambda: kconvert.apply(bad, there),
        lambda: kconvert.apply(there, bad),
        lambda: load(tiny("qwen"), bad),
        lambda: export(model, bad),
    ]
    if bad is not None:
        calls.append(lambda: export(model, tmp_path / "out", source=bad))
    for call in calls:
        with pytest.raises(KconvertError, match=r"is no path; give a str or a pathlib\.Path"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"shard_size": 0},
        {"shard_size": "5GB"},
        {"shard_size": None},
        {"shard_size": 1.5},
        {"tokenizer": "gpt2"},
        {"advance": 3},
    ],
    ids=repr,
)
def test_an_export_by_options_that_mean_nothing_writes_nothing(exported, tmp_path, options):
    (name, _), *_ = options.items()
    for only_changed in (False, True):
        with pytest.raises(KconvertError, match=name):
            export(exported[0], tmp_path / "out", only_changed=only_changed, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [0, -1, "2", 1.5, True], ids=repr)
def test_what_is_no_number_of_threads_is_refused(exported, bad):
    with pytest.raises(KconvertError, match=r"^there are no .* threads; give a number"):
        kconvert.open(exported[1], threads=bad)


@pytest.mark.parametrize("rows", [(None, None), ("0", "1"), (0.5, 1)], ids=repr)
def test_what_are_no_rows_is_refused(exported, rows):
    with kconvert.open(exported[1]) as weights, pytest.raises(KconvertError, match="has no rows"):
        weights.rows("lm_head.weight", *rows)


@pytest.mark.parametrize(
    "options",
    [{"convention": []}, {"convention": 3}, {"group_size": False}, {"group_size": []}, {"group_size": "32"}],
    ids=repr,
)
def test_a_configuration_of_another_kind_is_refused(options):
    with pytest.raises(KconvertError, match=SENTENCE):
        QATConfig(**options)


@pytest.mark.parametrize("bad", [None, 3, "[]", "{"], ids=repr)
def test_a_configuration_that_is_no_json_is_refused(bad):
    with pytest.raises(KconvertError, match=SENTENCE):
        QATConfig.from_json(bad)


def test_the_device_of_a_model_with_memory_stays(exported, tiny):
    model = tiny("qwen")
    load(model, exported[1], device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
