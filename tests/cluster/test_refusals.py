"""What the workers of Ray cannot do is said before there is a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from kconvert import KconvertError, Recipe, convert, plan


def test_a_destination_in_the_hub_is_for_one_machine(int4: Path) -> None:
    with pytest.raises(
        KconvertError, match="ranks cannot send to the Hub, where one commit has to name all shards; let"
    ):
        convert(plan(int4, Recipe("bf16")), "hf://me/tiny", engine="ray")


def test_replacing_is_for_one_machine(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(KconvertError, match="ranks replace nothing"):
        convert(plan(int4, Recipe("bf16")), tmp_path / "bf16", engine="ray", overwrite=True)

    assert not (tmp_path / "bf16").exists()
