"""Stock that shards lend each other, on a model: whatever crashes, none is sold twice or lost."""

from collections import Counter

import pytest
from drills import often
from hypothesis import given, settings
from hypothesis import strategies as st
from lending import SCENARIOS, Broken, World, dealt, live, rush, with_fault

from app.stock import dealing

SEEDS = st.integers(0, 2**32)


@settings(max_examples=often(200, 100_000), deadline=None)
@given(SEEDS, st.integers(2, 4))
def test_whatever_happens_every_promise_is_kept(seed, shards):
    live(World(seed, shards))


@settings(max_examples=often(2, 1000), deadline=None)
@given(SEEDS)
def test_a_rush_of_200_for_100_units_on_24_shards_sells_exactly_100(seed):
    assert Counter(rush(seed)) == {"accepted": 100, "refused": 100}


def twice_the_rest(units: int, first: int, shards: int) -> list[int]:
    each, more = divmod(units, shards)
    return [each + 2 * ((shard - first) % shards < more) for shard in range(shards)]


def fault(*changes, faults=(), deal=None):
    return (changes, frozenset(faults), deal)


FAULTS = {
    "give before the replicas have what was taken": fault(
        ("(names[source], product_id, shard, lacking), sure=True)",
         "(names[source], product_id, shard, lacking), sure=False)")
    ),
    "done before the replicas have what was given": fault(
        ("(names[to], source, number, units), True, source)",
         "(names[to], source, number, units), False, source)")
    ),
    "done before it is given": fault(
        ('answer in ("given", "repeated", b"given", b"repeated")', "True")
    ),
    "gone on with what no replica has": fault(
        ("(names[source], late_ms, MOST_ENTRIES), sure=True)",
         "(names[source], late_ms, MOST_ENTRIES), sure=False)")
    ),
    "one scan instead of two": fault(
        ("elif before and _agree(before, scan):", "elif (before := before or scan):")
    ),
    "the rest is dealt twice": fault(deal=twice_the_rest),
    "a seal that a restock does not open": fault(faults=["a seal that a restock does not open"]),
    "a seal though it was unsealed": fault(faults=["a seal though it was unsealed"]),
    "give after a rebuild": fault(faults=["give after a rebuild"]),
    "given twice": fault(faults=["given twice"]),
}  # fmt: skip


@pytest.mark.parametrize(("scenario", "shards"), SCENARIOS)
def test_what_chance_seldom_brings_about_does_no_harm(scenario, shards):
    scenario(World(0, shards))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    changes, faults, deal = FAULTS[name]
    module = with_fault(*changes) if changes else dealing

    def is_found(live_through, seed, shards) -> bool:
        try:
            live_through(World(seed, shards, module, faults, deal or dealt))
        except Broken:
            return True
        return False

    assert any(is_found(scenario, 0, shards) for scenario, shards in SCENARIOS) or any(
        is_found(live, seed, 2 + seed % 3) for seed in range(10_000)
    )
