"""The arithmetic of the disk budget, on plans that no real model has."""

import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from kconvert.planning.containers import Shard
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Copy, Place
from kconvert.run.budget import Ledger, make_schedule

SIZES = st.integers(1, 50)


@st.composite
def plans(draw):
    """Steps that copy tensors from any of a few files to any of a few shards, in any order."""
    sources = {f"s{i}": draw(SIZES) for i in range(draw(st.integers(1, 5)))}
    shards = [Shard(f"o{i}", b"", draw(SIZES), ()) for i in range(draw(st.integers(1, 5)))]
    order = draw(st.lists(st.sampled_from([shard.name for shard in shards]), max_size=12))
    steps = []
    for number, shard in enumerate([*order, *(shard.name for shard in shards)]):
        file = draw(st.sampled_from(sorted(sources)))
        steps.append(Copy(f"t{number}", "U8", (1,), (Place(file, 0),), (Place(shard, 0),)))
    return Plan("", None, tuple(steps), tuple(shards), {}, {}), sources


def carry_out(plan, sources, budget, leaving, finished=(), present=()):
    """Take every step as several workers might, and return the most that was held; fails where one waits for ever."""
    schedule = make_schedule(plan, finished, sources, present, finished if leaving else None)
    ledger = Ledger(schedule, budget)
    held = most = 0
    here, begun = set(), set()
    left = {shard.name: sum(step.writes[0].file == shard.name for step in plan.steps) for shard in plan.shards}
    needed_by = {file: {shard for shard, files in schedule.sources.items() if file in files} for file in sources}
    sizes = {shard.name: shard.nbytes for shard in plan.shards}
    if not leaving:
        held = sum(sizes[name] for name in finished)

    def arrive():
        nonlocal held, most
        while ledger._arrivals:
            file = ledger.next_source()
            here.add(file)
            held += sources[file]
            most = max(most, held)

    for step in plan.steps:
        shard, file = step.writes[0].file, step.reads[0].file
        if shard in finished:
            continue
        arrive()
        assert file in here, "a worker would wait for ever"
        assert ("output", shard) in ledger._granted, "a worker would wait for ever"
        if shard not in begun:
            begun.add(shard)
            held += sizes[shard]
            most = max(most, held)
        left[shard] -= 1
        if left[shard] == 0:
            for name in schedule.sources[shard]:
                needed_by[name].discard(shard)
                if not needed_by[name]:
                    held -= sources[name]
                    ledger.release(("source", name))
            if leaving:
                held -= sizes[shard]
                ledger.release(("output", shard))
    return most


@settings(max_examples=300)
@given(plans(), st.booleans(), st.integers(0, 40))
def test_the_smallest_budget_suffices_in_order_and_any_larger_one_too(example, leaving, more):
    plan, sources = example
    peak = make_schedule(plan, (), sources, (), () if leaving else None).peak
    assert carry_out(plan, sources, peak + more, leaving) <= peak + more


@settings(max_examples=100)
@given(plans(), st.booleans(), st.data())
def test_so_it_does_for_a_run_that_goes_on(example, leaving, data):
    plan, sources = example
    finished = {shard.name for shard in plan.shards if data.draw(st.booleans())}
    present = {file for file in sources if data.draw(st.booleans())}
    peak = make_schedule(plan, finished, sources, present, finished if leaving else None).peak
    assert carry_out(plan, sources, peak, leaving, finished, present) <= peak


def test_whoever_waits_for_room_hears_of_a_failure():
    plan = Plan("", None, (), (Shard("o", b"", 10, ()),), {}, {})
    ledger = Ledger(make_schedule(plan, (), {}), 5)
    heard = []

    def wait():
        try:
            ledger.admit(("output", "o"))
        except RuntimeError as error:
            heard.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    ledger.fail(RuntimeError("first"))
    ledger.fail(RuntimeError("second"))
    thread.join(10)
    assert heard == ["first"]
