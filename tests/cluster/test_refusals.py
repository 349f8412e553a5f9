"""What the workers of Ray cannot do is said before there is a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from kconvert import KconvertError, Recipe, convert, plan


def test_a_destination_in_an_object_store_is_for_ranks(int4: Path) -> None:
    with pytest.raises(
        KconvertError, match="--engine ray writes to directories; start ranks by --worker for a DST in an"
    ):
        convert(plan(int4, Recipe("bf16")), "s3://models/bf16", engine="ray")


def test_a_disk_budget_is_for_one_process(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(
        KconvertError, match="the workers of Ray cannot keep within --disk-budget; leave it out, or start"
    ):
        convert(plan(int4, Recipe("bf16")), tmp_path / "bf16", engine="ray", disk_budget=1 << 30)

    assert not (tmp_path / "bf16").exists()
