"""`kconvert qat train` and the callback, under transformers' Trainer."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import kconvert
from kconvert.errors import KconvertError
from kconvert_qat import QATConfig, prepare

pytest.importorskip("accelerate")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(__file__).read_text() * 4)
    return path


@pytest.fixture(scope="session")
def base(tiny, tmp_path_factory):
    """A checkpoint with a tokenizer that has a token for each byte, as far as there are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("base")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:126]
    vocabulary = {token: k for k, token in enumerate(["<end>", "<unknown>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>").save_pretrained(root)
    tiny().save_pretrained(root)
    return root


@pytest.fixture
def request_(base, text, tmp_path):
    from kconvert_qat.trainer import TrainRequest

    def make(**options):
        sizes = {"steps": 4, "batch_size": 2, "block": 32, "save_every": 2, "learning_rate": 1e-3}
        return TrainRequest(**{"model": base, "text": (text,), "output": tmp_path / "out", **sizes, **options})

    return make


def test_the_command_trains_and_ships_what_it_trained(kconvert, base, text, tmp_path):
    options = ["--steps", 3, "--batch-size", 2, "--block", 32, "--learning-rate", 1e-3, "--json"]
    more = tmp_path / "more.txt"
    more.write_text("def f(x):\n    return x\n" * 40)
    done = kconvert(
        "qat", "train", "--model", base, "--text", text, more, *options, "--output", tmp_path / "out", timeout=200
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["loss_trained"] < outcome["loss_quantised"]
    for name in (
        "int4/config.json",
        "int4/tokenizer.json",
        "int4/qat_config.json",
        "masters/config.json",
        "training.png",
    ):
        assert (tmp_path / "out" / name).stat().st_size
    assert json.loads((tmp_path / "out" / "request.json").read_text())["text"] == [str(text), str(more)]
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert log[0]["qat_sqnr"] > 15
    assert 0 < log[-2]["qat_changed"] < 1


def test_a_quantised_checkpoint_trains_and_comes_back_with_its_own_config(tiny, base, request_, tmp_path):
    from kconvert_qat import export
    from kconvert_qat.trainer import load_model, train

    model = tiny()
    prepare(model)
    shutil.copytree(base, tmp_path / "int4", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    export(model, tmp_path / "made")
    for path in (tmp_path / "made").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / "int4")
    plan = kconvert.plan(tmp_path / "int4", kconvert.Recipe("bf16"))
    kconvert.convert(plan, tmp_path / "bf16")
    quantised = train(request_(model=tmp_path / "int4", output=tmp_path / "one"))
    by_way_of_a_copy = train(request_(model=tmp_path / "bf16", source=tmp_path / "int4", output=tmp_path / "two"))
    assert quantised.loss_before == by_way_of_a_copy.loss_before
    assert quantised.loss_trained == by_way_of_a_copy.loss_trained
    assert quantised.loss_before == quantised.loss_quantised  # on the grid already
    config = json.loads((quantised.shipped / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "quantization_config" not in json.loads((quantised.output / "masters" / "config.json").read_text())
    assert load_model(quantised.shipped, torch.bfloat16)


def test_a_quantised_checkpoint_on_another_grid_is_one_sentence(base, request_, tmp_path):
    from kconvert_qat.trainer import train

    kconvert.convert(kconvert.plan(base, kconvert.Recipe("fp8")), tmp_path / "fp8")
    with pytest.raises(KconvertError, match=r"as fp8.*, but the QAT grid is int4"):
        train(request_(model=tmp_path / "fp8"))


def test_what_transformers_could_not_load_is_refused_before_the_training_and_trained_on_request(
    tiny, base, request_, tmp_path
):
    from kconvert_qat.trainer import train

    model = shutil.copytree(base, tmp_path / "granite", ignore=shutil.ignore_patterns("*.safetensors"))
    tiny("granite").save_pretrained(model)
    with pytest.raises(KconvertError, match="would load random values"):
        train(request_(model=model))
    assert not (tmp_path / "out").exists()
    train(request_(model=model, steps=1, for_transformers=False))
    assert (tmp_path / "out" / "int4" / "config.json").exists()


@pytest.mark.parametrize(
    "spelled", ["--text a b --steps 1", "--text a --steps 1 --text b", "--text=a --text b --steps 1"]
)
def test_text_takes_all_files_up_to_the_next_option_and_can_be_repeated(spelled, tmp_path, monkeypatch):
    from kconvert.cli.qat import train

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).touch()
    context = train.make_context("train", [*spelled.split(), "--model", ".", "--output", "out"])
    assert context.params["text"] == (Path("a"), Path("b"))
    assert context.params["steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text"], "[Mm]issing"),
        (["a"], "unexpected extra argument"),
        (["--text", "no"], "does not exist"),
    ],
)
def test_text_that_is_missing_or_comes_without_its_option_is_refused(arguments, message, tmp_path, monkeypatch):
    from click import UsageError

    from kconvert.cli.qat import train

    monkeypatch.chdir(tmp_path)
    given = arguments if "--text" in arguments else ["--text", __file__, "--seed", "1", *arguments]
    with pytest.raises(UsageError, match=message):
        train.make_context("train", [*given, "--steps", "1", "--model", ".", "--output", "out"])


def test_an_interrupted_training_ends_as_an_undisturbed_one(request_, tmp_path):
    from kconvert_qat.trainer import train

    whole = train(request_(output=tmp_path / "whole"))

    def interrupt(step, logs):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(request_(), interrupt)
    steps = []
    resumed = train(request_(), lambda step, logs: steps.append(step))
    assert min(steps) == 3
    assert resumed.loss_trained == whole.loss_trained


def test_another_request_does_not_go_on_in_the_same_place(request_):
    from kconvert_qat.trainer import train

    request = request_(steps=1)
    train(request)
    with pytest.raises(KconvertError, match="other settings"):
        train(request_(steps=2))


def test_a_resume_that_leaves_the_experts_behind_is_an_error(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    from kconvert_qat.callback import QATCallback

    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8

    def trainer(model):
        prepare(model)
        options = {"max_steps": 4, "save_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-2, **options)
        return Trainer(model, arguments, train_dataset=data, callbacks=[QATCallback()])

    trainer(tiny(dtype=torch.float32)).train()
    with pytest.raises(KconvertError, match="from_pretrained before resuming"):
        trainer(tiny(dtype=torch.float32)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_distillation_pulls_towards_the_teacher(request_, base):
    from kconvert_qat.trainer import train

    config = QATConfig(distillation=1.0, temperature=2.0)
    outcome = train(request_(config=config, teacher=base, steps=2))
    assert abs(outcome.loss_trained - outcome.loss_before) < 0.2


def test_a_source_on_another_grid_is_refused(request_, tiny, tmp_path):
    from kconvert_qat import export
    from kconvert_qat.trainer import train

    model = tiny()
    prepare(model)
    export(model, tmp_path / "source")
    with pytest.raises(KconvertError, match="QAT grid is int4 kimi group 16"):
        train(request_(config=QATConfig(group_size=16), source=tmp_path / "source"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": Path("x")}, "go together"),
        ({"masters": "f16"}, "no masters in"),
        ({"text": (Path("none"),)}, "cannot be read"),
        ({"learning_rate": -1.0}, "must be between 0 and 1"),
        ({"config": QATConfig(group_size=48)}, "do not divide into groups of 48"),
        ({"config": QATConfig(distillation=0.5), "teacher": Path("none")}, "is not a directory"),
        ({"source": Path("none")}, "is not a directory"),
    ],
)
def test_bad_requests_are_one_sentence_and_leave_the_output_free(request_, options, message, tmp_path):
    from kconvert_qat.trainer import train

    with pytest.raises(KconvertError, match=message):
        train(request_(**options))
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_another_vocabulary_is_refused(request_, base, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    from kconvert_qat.trainer import train

    shutil.copytree(base, tmp_path / "teacher")
    other = AutoModelForCausalLM.from_pretrained(base)
    other.resize_token_embeddings(96)
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(KconvertError, match=r"teacher has a vocabulary of 96, but .* one of 128"):
        train(request_(config=QATConfig(distillation=0.5), teacher=tmp_path / "teacher"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("convention", "none"),
        ("group_size", 20),
        ("group_size", True),
        ("targets", ()),
        ("targets", None),
        ("targets", "expert"),
        ("targets", ["expert", 1]),
        ("grid", ["int4"]),
        ("grid", "int8"),
        ("convention", ["kimi"]),
        ("start_step", -1),
        ("gradient", "x"),
        ("lora", "x"),
        ("distillation", 1.5),
        ("temperature", 0),
        ("temperature", float("nan")),
    ],
)
def test_a_configuration_says_which_field_is_wrong(field, value):
    with pytest.raises(KconvertError, match=field):
        QATConfig(**{field: value})


def test_a_configuration_survives_json():
    config = QATConfig(group_size=64, targets=("expert.down", "*.3.*"), distillation=0.5)
    assert QATConfig.from_json(config.to_json()) == config
    with pytest.raises(KconvertError, match="keys"):
        QATConfig.from_json('{"no": 1}')
