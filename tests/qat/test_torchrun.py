"""The example for several machines runs, on two processes, from codes to a patch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kconvert
from kconvert_qat import export, prepare

pytest.importorskip("tokenizers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "qat_torchrun.py"


@pytest.fixture
def int4(tiny, tmp_path):
    """A quantised checkpoint with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:126]
    vocabulary = {token: k for k, token in enumerate(["<end>", "<unknown>", *letters])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unknown>")
    model = tiny("qwen")
    prepare(model)
    export(model, tmp_path / "int4", tokenizer=tokenizer)
    return tmp_path / "int4"


def test_the_example_for_torchrun_trains_from_codes_and_leaves_an_export_and_a_patch_that_fit(int4, tmp_path):
    sizes = ["--steps=2", "--patch-every=2", "--micro-batches=2", "--block=16", "--learning-rate=1e-2"]
    paths = [f"--model={int4}", f"--text={__file__}", f"--output={tmp_path / 'out'}"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        EXAMPLE,
        *paths,
        *sizes,
    ]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("24 expert matrices")
    first = tmp_path / "out" / "first"
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (int4, first)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "experts" in name)
    assert kconvert.apply(first, tmp_path / "out" / "patch-2").tensors > 24
    assert kconvert.inspect(first).weights
