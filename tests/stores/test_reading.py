"""Checkpoints in an object store: what is read, and what becomes of a store's faults."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from click.testing import CliRunner
from s3_server import SECRET, short, status

import kconvert
from kconvert import KconvertError
from kconvert.checkpoint.remote import Memory
from kconvert.cli import main
from kconvert.stores import client
from kconvert.stores.urls import StoreUrl, parse_store_url

from .conftest import PLACE


def run(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert SECRET not in result.output
    return result


def files(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".kconvert" not in path.parts
    }


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a/b/", StoreUrl("s3", "bucket", "a/b")),
        ("gs://bucket", StoreUrl("gs", "bucket", "")),
        ("az://box/x", StoreUrl("az", "box", "x")),
        ("s3://", None),
        ("s3:/bucket/a", None),
        ("org/name", None),
        ("hf://org/name", None),
        ("http://host/a", None),
    ],
)
def test_addresses(text, url):
    assert parse_store_url(text) == url


def test_inspect_reads_headers_and_no_weights(bucket, stored, int4):
    found, local = kconvert.inspect(stored), kconvert.inspect(int4)
    assert {weight.name for weight in found.weights} == {weight.name for weight in local.weights}
    assert found.checkpoint.name == PLACE
    assert all(asked.startswith("bytes=0-") for name, asked in bucket.asked if name.endswith(".safetensors"))


@pytest.mark.parametrize("options", [(), ("--disk-budget", "20MB")], ids=["all the disk", "within a budget"])
def test_a_conversion_from_a_store_writes_the_bytes_of_a_local_one(stored, int4, tmp_path, options):
    for source, folder, more in ((int4, "local", ()), (stored, "far", options)):
        done = run("int4-to-bf16", source, tmp_path / folder, "--shard-size", "1MB", "-q", *more)
        assert done.exit_code == 0, done.output
    assert files(tmp_path / "far") == files(tmp_path / "local")
    assert {path.name for path in (tmp_path / "far" / ".kconvert").iterdir()} == {"journal.jsonl", "lock"}
    assert run("verify", stored, tmp_path / "far", "-q").exit_code == 0


def test_both_sides_of_verify_may_be_in_a_store(stored):
    done = run("verify", stored, stored)
    assert done.exit_code == 0, done.output


def test_verify_in_a_process_of_its_own_comes_to_an_end(stored, int4):
    """Connections of a store stand still in a fork; here nothing has loaded compressed-tensors yet, for which there is one."""
    command = [sys.executable, "-c", "from kconvert.cli import main; main()", "verify", stored, str(int4)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_tensor_is_opened_by_its_bytes_alone(bucket, stored, int4):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    with kconvert.open(stored) as far, kconvert.open(int4) as near:
        bucket.asked.clear()
        assert (far[name] == near[name]).all()
    ends = [asked.removeprefix("bytes=").split("-") for _, asked in bucket.asked]
    assert sum(int(last) - int(first) + 1 for first, last in ends) < 2 * near_bytes(int4, name)


def near_bytes(root, name):
    """Of all tensors that spell a weight."""
    tensors = kconvert.inspect(root).checkpoint.tensors
    return sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(name))


@pytest.mark.parametrize(
    "fault", [status("500 Server Error"), status("503 Slow Down"), short], ids=["500", "503", "short body"]
)
def test_faults_that_pass_change_nothing(bucket, stored, int4, tmp_path, fault):
    plan = kconvert.plan(stored, kconvert.Recipe("bf16"))
    bucket.faults.extend([fault] * 3)
    kconvert.convert(plan, tmp_path / "far")
    kconvert.convert(kconvert.plan(int4, kconvert.Recipe("bf16")), tmp_path / "local")
    assert not bucket.faults
    assert files(tmp_path / "far") == files(tmp_path / "local")


def test_a_refusal_is_one_sentence(bucket, stored):
    bucket.faults.extend([status("403 Forbidden")] * 9)
    said = run("inspect", stored)
    assert said.exit_code == 2
    assert "access was refused; check the credentials" in said.output


@pytest.fixture
def nobody(bucket, monkeypatch, tmp_path):
    """A user who has no credentials of any kind."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("command", [("inspect",), ("convert", "--to", "bf16"), ("finalize",)])
def test_without_credentials_the_sentence_says_so(nobody, int4, command):
    arguments = [int4, PLACE] if command[0] == "convert" else [PLACE]
    said = run(*command, *arguments)
    assert said.exit_code == 2
    assert "there are no credentials for it; set them as the store's own command line takes them" in said.output
    assert "Traceback" not in said.output


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        ("az://box/x", {}),
        ("az://box/x", {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_ACCOUNT_KEY": "no base64"}),
        ("s3://models/a", {"AWS_PROFILE": "nobody"}),
    ],
    ids=["no account", "a key that is none", "no such profile"],
)
def test_settings_that_make_no_sense_are_not_called_a_fault_of_the_store(nobody, monkeypatch, place, variables):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT", "AZURE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = run("inspect", place)
    assert said.exit_code == 2
    assert f"{place}: cannot open it, what is set for it makes no sense; set account, profile and keys" in said.output


def test_who_gets_no_token_has_no_credentials_and_does_not_wait(stored, monkeypatch):
    from obstore.exceptions import GenericError

    asked = []

    def list_nothing(store):
        asked.append(store)
        raise GenericError(
            "Generic GCS error: Error performing token request: Error performing GET http://169.254.169.254/"
        )

    monkeypatch.setattr("obstore.list", list_nothing)
    assert "cannot list its objects, nobody here gives credentials for it; set them" in run("inspect", stored).output
    assert len(asked) == 1


def test_requests_without_a_signature_take_no_credentials(nobody, stored, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert "access was refused" in run("inspect", stored).output  # by the server, as the objects are private


def test_an_object_that_changes_meanwhile_is_never_mixed(bucket, stored, int4, tmp_path):
    plan = kconvert.plan(stored, kconvert.Recipe("bf16"))
    shard = sorted(int4.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    import obstore

    obstore.put(client.open_store(parse_store_url(PLACE)), shard.name, bytes(content))
    with pytest.raises(KconvertError, match=rf"{shard.name}, the object has changed since the command began"):
        kconvert.convert(plan, tmp_path / "far")
    assert not (tmp_path / "far" / "config.json").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://nowhere/a", "there is no bucket 'nowhere'"),
        ("s3://models/other", "has no objects"),
    ],
)
def test_a_place_where_nothing_is(bucket, place, words):
    said = run("inspect", place)
    assert said.exit_code == 2
    assert words in said.output


def test_a_store_has_no_revisions(bucket):
    assert "has no revisions" in run("inspect", PLACE, "--revision", "main").output


def test_without_obstore_the_sentence_says_what_to_install(monkeypatch, bucket):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "obstore" else found(name))
    assert "pip install 'kconvert-toolkit[cloud]'" in run("inspect", PLACE).output


def test_names_that_lead_elsewhere_are_not_trusted(bucket, stored):
    bucket.put("models/kimi/tiny/a%5Cb.json", b"{}")
    assert "which could lead anywhere" in run("inspect", stored).output


@pytest.mark.parametrize("stamp", ["tag", None])
def test_no_more_is_taken_than_was_asked_for_and_no_condition_made_without_a_tag(monkeypatch, stamp):
    class Answer:
        def stream(self, min_chunk_size):
            yield b"x" * 10

    def get(store, file, options):
        asked.append(options)
        return Answer()

    asked = []
    monkeypatch.setattr("obstore.get", get)
    found = bytearray(6)
    client.transfer(parse_store_url("s3://bucket/place"), None, stamp, "file", 0, 6, Memory(found))
    assert found == b"xxxxxx"
    assert [option.get("if_match", None) for option in asked] == [stamp]
    assert all(None not in option.values() for option in asked)
