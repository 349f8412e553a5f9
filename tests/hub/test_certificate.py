"""Certificates of and against what is on the Hub."""

import json


def test_a_repository_is_what_a_copy_was_proven_against_and_can_be_checked_itself(remote, hub, int4, command, tmp_path):
    path = tmp_path / "proof.json"
    command.ok("verify", remote, int4, "--certificate", path)
    found = json.loads(path.read_text())["source"]
    command.ok("verify", int4, int4, "--certificate", tmp_path / "local.json")
    local = json.loads((tmp_path / "local.json").read_text())["source"]
    assert found["name"].startswith(f"{remote}@")
    assert (found["files"], found["headers"]) == (local["files"], local["headers"])
    assert f"verified against {remote}@" in command.ok("check", remote, path)
    assert "org/nobody" in command.refused("check", "org/nobody", path)
