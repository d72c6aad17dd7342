"""Stock that is lent from shard to shard: a shard that is dry asks the others before it refuses.

    take (source: free − k, sent + k, an entry)   its replicas have it
    give (target: a bit for the entry, free + k, received + k)   its replicas have it
    done (source: the entry goes)

Whoever finds an old entry may go on from there: at most once, whatever crashes in between. What is
decided here stands in generators, which neither block nor await: they yield what is to be asked of
shards, and get the answers, so that threads, event loops and the tests' model share them.
"""

from collections.abc import Generator, Sequence
from itertools import islice
from typing import Any, NamedTuple

# How long a shard refuses without asking the others, from when they were asked. A unit that comes
# to another shard a moment later is refused for no longer than this.
SEAL_MS = 500
# A puller needs a few ms for an entry; of one that is older it may have died.
LATE_MS = 100
# Units on their way are soon there.
PAUSE_SECONDS = 0.01
# Follows a seal's time where a shard was out of reach: it may have some.
AWAY = " away"
# Entries are read so many at a time.
MOST_ENTRIES = 1000


class Ask(NamedTuple):
    """A script that a shard is asked to run; `sure` that its replicas are to have all that is read.

    `source` is the shard that lent, where it matters to the keys.
    """

    shard: int
    script: str
    product_id: int
    args: tuple[Any, ...]
    sure: bool = False
    source: int = 0


# None where a shard has given no answer, and may or may not have done it.
Answers = list[Any]


class Pulled(NamedTuple):
    """What became of a pull: units have come, or all shards were asked and there are too few.

    `found` is how many units the others have in all, None where the claim may find them now.
    `final` is False when a shard was out of reach. `rest` may be asked without waiting for answers.
    """

    found: int | None
    final: bool = True
    rest: Sequence[Ask] = ()


# Asks are for all at once; a number is seconds to pause.
Steps = Generator[list[Ask] | float, Answers, Any]


class Reading(NamedTuple):
    """A shard's answer to a scan."""

    now_ms: int
    free: int
    moved: int
    # Fields of what was lent of it, such as sent.3, recv.0; and unsealed, when that was.
    lent: dict[str, int]
    late: list[int]

    @classmethod
    def of(cls, answer: Any) -> "Reading | None":
        """Read the answer of scan.lua; None when there is none, or not of this sale."""
        if not answer:
            return None
        now, free, moved, lent, late = answer
        words = [each.decode() if isinstance(each, bytes) else str(each) for each in lent]
        figures = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        return cls(int(now), int(free), int(moved), figures, [int(each) for each in late])


def pull(names: Sequence[str], shard: int, product_id: int, units: int, gather: bool) -> Steps:
    """Have others lend a shard so many units of a product, or find that they have too few.

    `names` is how each shard names the sale. Without `gather` nothing is lent for more than one
    unit. Returns Pulled. Goes on for as long as others are at it: whoever runs it ends it.
    """
    before: list[Reading | None] | None = None
    while True:
        scan = yield from _scan(names, product_id)
        there = [number for number, reading in enumerate(scan) if reading]
        late = [
            source for source in there if (found := scan[source]) and set(found.late) & set(there)
        ]
        if late:
            done = 0
            for source in late:
                done += yield from finish(names, source)
            if not done:
                yield PAUSE_SECONDS
            before = None
            continue
        own = scan[shard]
        if own is None or own.free >= units:
            return Pulled(None)
        free = {number: reading.free for number in there if (reading := scan[number])}
        found = sum(free.values())
        if found >= units and (gather or units == 1):
            pulled = yield from _gather(names, shard, product_id, units, free)
            if pulled:
                return pulled
            before = None
        elif found:
            return Pulled(min(found, units - 1), len(there) == len(names))
        elif _in_transit(before or scan, scan):
            yield PAUSE_SECONDS
            before = None
        elif before and _agree(before, scan):
            final = len(there) == len(names)
            yield from _seal(names, product_id, before, final)
            return Pulled(0, final)
        else:
            before = scan


def _scan(names: Sequence[str], product_id: int) -> Steps:
    asks = [
        Ask(shard, "scan", product_id, (name, product_id, LATE_MS))
        for shard, name in enumerate(names)
    ]
    answers = yield asks
    return [Reading.of(answer) for answer in answers]


def _gather(
    names: Sequence[str], shard: int, product_id: int, units: int, free: dict[int, int]
) -> Steps:
    """Take from the richest until there is enough; return Pulled, None when nothing came.

    Of equally rich ones each shard begins at another, so that not all ask the same.
    """
    lacking, rest = units - free[shard], []
    for source in sorted(free, key=lambda each: (-free[each], (each - shard) % len(names))):
        if source == shard or not free[source] or lacking <= 0:
            continue
        (taken,) = yield [
            Ask(source, "take", product_id, (names[source], product_id, shard, lacking), sure=True)
        ]
        if not taken or not int(taken[2]):
            continue
        number, came = int(taken[1]), int(taken[2])
        (given,) = yield [_give(names, source, number, shard, product_id, came)]
        if _is_given(given):
            lacking -= came
            rest.append(_done(names, source, [number]))
    return Pulled(None, rest=rest) if rest else None


def finish(names: Sequence[str], source: int, late_ms: int = LATE_MS) -> Steps:
    """Give what a shard lent a while ago, whoever was at it; return how many entries are done."""
    # What was read is on the replicas as well: a promoted one must not sell it again.
    (entries,) = yield [
        Ask(source, "sent", 0, (names[source], late_ms, MOST_ENTRIES), sure=True),
    ]
    gives = [
        _give(names, source, int(number), int(to), int(product_id), int(units))
        for number, to, product_id, units in entries or ()
    ]
    if not gives:
        return 0
    answers = yield gives
    done = [
        int(entry[0]) for entry, answer in zip(entries, answers, strict=True) if _is_given(answer)
    ]
    if done:
        yield [_done(names, source, done)]
    return len(done)


def _give(
    names: Sequence[str], source: int, number: int, to: int, product_id: int, units: int
) -> Ask:
    return Ask(to, "give", product_id, (names[to], source, number, units), True, source)


def _is_given(answer: Any) -> bool:
    return answer in ("given", "repeated", b"given", b"repeated")


def _done(names: Sequence[str], source: int, numbers: list[int]) -> Ask:
    return Ask(source, "done", 0, (names[source], *numbers))


def _seal(names: Sequence[str], product_id: int, scan: list[Reading | None], final: bool) -> Steps:
    """Have every shard in reach refuse by itself for a while, from when the scan was made."""
    yield [
        Ask(
            shard,
            "seal",
            product_id,
            (
                names[shard],
                reading.lent.get("unsealed", 0),
                f"{reading.now_ms + SEAL_MS}{'' if final else AWAY}",
            ),
        )
        for shard, reading in enumerate(scan)
        if reading
    ]


def abreast(many: Sequence[Steps]) -> Steps:
    """Take the steps of several side by side, none of which pauses; return what each comes to."""
    results: list[Any] = [None] * len(many)
    waiting: dict[int, Answers | None] = dict.fromkeys(range(len(many)))
    while True:
        asks: dict[int, list[Ask]] = {}
        for number, answers in waiting.items():
            try:
                step = many[number].send(answers)  # type: ignore[arg-type]  # None starts it
                assert isinstance(step, list)
                asks[number] = step
            except StopIteration as stop:
                results[number] = stop.value
        if not asks:
            return results
        found = iter((yield [ask for step in asks.values() for ask in step]))
        waiting = {number: list(islice(found, len(step))) for number, step in asks.items()}


def unseal(shards: int, product_id: int) -> Steps:
    """Have every shard ask the others again, because units have come to one of them."""
    yield [Ask(shard, "unseal", product_id, ()) for shard in range(shards)]


def ask_once(asks: Sequence[Ask]) -> Steps:
    """Ask, whatever the answers."""
    yield list(asks)


def _in_transit(received: list[Reading | None], sent: list[Reading | None]) -> bool:
    """Tell whether units are on their way between shards that were read both times.

    What was received is read before what was sent, so that nothing on its way is missed.
    """
    return any(
        source.lent.get(f"sent.{to}", 0) != target.lent.get(f"recv.{number}", 0)
        for number, source in enumerate(sent)
        for to, target in enumerate(received)
        if source and target
    )


def _agree(before: list[Reading | None], scan: list[Reading | None]) -> bool:
    """Tell whether no stock moved between two scans: then there was a moment without any."""
    return [reading and (reading.moved, reading.lent) for reading in before] == [
        reading and (reading.moved, reading.lent) for reading in scan
    ]
