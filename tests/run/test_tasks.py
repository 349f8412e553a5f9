"""What a worker takes at a time."""

import pytest

from kconvert import Recipe, plan
from kconvert.planning.steps import Transcode
from kconvert.run.tiles import row_bytes, row_unit, task_size


@pytest.mark.parametrize("target", ["bf16", "fp8"])
def test_tasks_of_a_weight_are_alike_and_no_more_than_they_have_to_be(int4, target):
    steps = [step for step in plan(int4, Recipe(target)).steps if isinstance(step, Transcode)]
    assert steps
    for step in steps:
        for share in (0.1, 0.3, 0.51, 0.99, 1, 5):
            nbytes = int(row_bytes(step) * step.rows * share)
            size, unit = task_size(step, nbytes), row_unit(step)
            most = max(unit, int(nbytes / row_bytes(step)) // unit * unit)
            number = -(-step.rows // size)
            assert size % unit == 0
            assert size <= max(most, unit)
            assert number <= -(-step.rows // most)
            assert step.rows - (number - 1) * size > size - number * unit
