"""A model of shards that lend each other stock, over which whatever can happen happens.

A shard is a log: a failover keeps what was acknowledged and as much of the rest as it likes. All
that programs do is split into steps, any of which may be the last; answers are lost. What is
decided is app/stock/dealing.py itself, or a copy of it with a planted fault.
"""

import copy
import inspect
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from app.stock import dealing
from app.stock.dealing import SEAL_MS, Ask

PRODUCT = 1
# What a shopper may be refused for while a unit is in reach.
PROMISED_MS = 1000


class Broken(AssertionError):
    """A promise was broken."""


def with_fault(*changes: tuple[str, str]) -> types.ModuleType:
    """Return a copy of dealing.py in which each text, which must occur once, is another."""
    source = inspect.getsource(dealing)
    for right, wrong in changes:
        assert source.count(right) == 1, f"{right!r} occurs {source.count(right)} times"
        source = source.replace(right, wrong)
    module = types.ModuleType("dealing")
    module.__package__ = "app.stock"
    exec(compile(source, "<dealing>", "exec"), module.__dict__)
    return module


@dataclass
class Log:
    """What a shard's log leaves behind."""

    sale: str | None = None
    free: int = 0
    moved: int = 0
    orders: dict[int, int] = field(default_factory=dict)
    movements: frozenset[int] = frozenset()
    lent: dict[str, int] = field(default_factory=dict)
    sends: int = 0
    entries: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    given: frozenset[tuple[int, int]] = frozenset()

    def copy(self) -> "Log":
        one = copy.copy(self)
        one.orders, one.lent, one.entries = dict(self.orders), dict(self.lent), dict(self.entries)
        return one


class Shard:
    """One shard, with the scripts of app/stock/lua, and claims and movements in short."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.log = Log()
        # What a failover may leave, from what is acknowledged to what stands; and where it begins.
        self.kept, self.first = [Log()], 0
        self.failovers = 0
        self.up = True
        # In memory alone.
        self.sealed, self.unsealed = 0, 0
        # Whether a shard was out of reach when it was sealed.
        self.away = False

    @property
    def position(self) -> int:
        return self.first + len(self.kept) - 1

    def wrote(self) -> None:
        self.kept.append(self.log.copy())

    def acknowledge(self, position: int) -> None:
        if position > self.first:
            del self.kept[: position - self.first]
            self.first = position

    def fail_over(self, oldest: bool) -> None:
        self.log = (self.kept[0] if oldest else self.world.random.choice(self.kept)).copy()
        self.kept, self.first = [self.log.copy()], self.position + 1
        self.failovers += 1
        self.sealed, self.unsealed = 0, 0

    def run(self, ask: Ask):
        return getattr(self, ask.script)(*ask.args)

    def claim(self, sale, order, units, found):
        """As claim.lua: accepted, dry, refused, or None where the sale is another."""
        log = self.log
        if log.sale != sale:
            return None
        if log.free >= units:
            log.free -= units
            log.orders[order] = units
            self.wrote()
            return "accepted"
        if found is None and self.sealed <= self.world.now:
            return "dry"
        return "refused"

    def move(self, sale, movement, units):
        log = self.log
        if log.sale != sale:
            return None
        if movement not in log.movements:
            log.movements |= {movement}
            log.free += units
            log.moved += units
            self.wrote()
        return "applied"

    def scan(self, sale, _product, late_ms):
        log = self.log
        if log.sale != sale:
            return []
        now = self.world.now
        late = [to for to, _, at in log.entries.values() if now - at >= late_ms]
        lent = {**log.lent, "unsealed": self.unsealed}
        return [now, log.free, log.moved, [x for pair in lent.items() for x in pair], late]

    def take(self, sale, _product, to, lacking):
        log = self.log
        if log.sale != sale:
            return ["unprepared", 0, 0]
        if log.free <= 0:
            return ["none", 0, 0]
        units = min(log.free, max(-(-log.free // 2), lacking))
        log.sends += 1
        log.free -= units
        log.lent[f"sent.{to}"] = log.lent.get(f"sent.{to}", 0) + units
        log.entries[log.sends] = (to, units, self.world.now)
        self.wrote()
        return ["taken", log.sends, units]

    def give(self, sale, source, number, units):
        log = self.log
        if log.sale != sale and "give after a rebuild" not in self.world.faults:
            return "unprepared"
        if (source, number) in log.given and "given twice" not in self.world.faults:
            return "repeated"
        log.given |= {(source, number)}
        log.free += units
        log.lent[f"recv.{source}"] = log.lent.get(f"recv.{source}", 0) + units
        self.wrote()
        return "given"

    def sent(self, sale, late_ms, _most):
        if self.log.sale != sale:
            return []
        return [
            [number, to, PRODUCT, units]
            for number, (to, units, at) in self.log.entries.items()
            if self.world.now - at >= late_ms
        ]

    def done(self, sale, *numbers):
        if self.log.sale == sale:
            for number in numbers:
                self.log.entries.pop(number, None)
            self.wrote()
        return 1

    def seal(self, sale, unsealed, until):
        same = unsealed == self.unsealed or "a seal though it was unsealed" in self.world.faults
        if self.log.sale != sale or not same:
            return 0
        until, _, away = str(until).partition(" ")
        self.sealed, self.away = int(until), bool(away)
        return 1

    def unseal(self):
        if "a seal that a restock does not open" not in self.world.faults:
            self.unsealed = next(self.world.moments)
            self.sealed = 0
        return 1


class Actor:
    """A program at work, one step at a time: asks are carried out in any order, and answered."""

    def __init__(self, world: "World", steps: Iterator, answered: Callable[[object], None]) -> None:
        self.world, self.steps, self.answered = world, steps, answered
        self.wake_at = 0
        # Nobody waits for longer than a second.
        self.until = world.now + PROMISED_MS
        self.ended = False
        self.go_on(None)

    def go_on(self, answers) -> None:
        try:
            step = next(self.steps) if answers is None else self.steps.send(answers)
        except StopIteration as stop:
            self.ended = True
            self.answered(stop.value)
            return
        self.asks, self.answers, self.open, self.waiting = [], [], [], []
        if isinstance(step, float):
            self.wake_at = self.world.now + round(step * 1000)
            return
        self.asks, self.answers = step, [None] * len(step)
        self.open = list(range(len(step)))

    def ready(self) -> bool:
        return self.wake_at <= self.world.now

    def step(self) -> None:
        world = self.world
        if world.now > self.until:
            self.steps.close()
            self.ended = True
            self.answered("undone")
            return
        if self.open and (not self.waiting or world.random.random() < 0.7):
            # Mostly in order, as they are sent.
            self.ask(self.open[0 if world.random.random() < 0.5 else -1])
        elif self.waiting:
            self.hear()
        if not self.open and not self.waiting:
            self.go_on(self.answers)

    def ask(self, number: int) -> None:
        """Have what is asked by this number carried out, if it can be."""
        self.open.remove(number)
        ask = self.asks[number]
        shard = self.world.shards[ask.shard]
        if not shard.up:
            return
        answer = shard.run(ask)
        if self.world.random.random() < self.world.lost:
            return
        if ask.sure:
            self.waiting.append((number, shard, shard.failovers, shard.position, answer))
        else:
            self.answers[number] = answer

    def hear(self) -> None:
        """Have the replicas of a shard acknowledge what was asked of it."""
        number, shard, failovers, position, answer = self.waiting.pop(0)
        if shard.up and shard.failovers == failovers:
            shard.acknowledge(position)
            self.answers[number] = answer

    def step_at(self, shard: int) -> None:
        """Have one shard do what is asked of it, and answer; go on when all have."""
        self.ask(next(number for number in self.open if self.asks[number].shard == shard))
        if self.waiting:
            self.hear()
        self.world.step_number += 1
        self.world.look()
        if not self.open:
            self.go_on(self.answers)

    def step_until(self, script: str) -> "Actor":
        """Go on until it is to ask for this."""
        while self.asks[0].script != script or not self.open:
            self.step()
            self.world.look()
        return self


class World:
    """Shards, and what goes on. Raises Broken as soon as a promise is."""

    def __init__(
        self,
        seed: int,
        shards: int,
        decide: types.ModuleType = dealing,
        faults: frozenset[str] = frozenset(),
        deal: Callable[[int, int, int], list[int]] | None = None,
    ) -> None:
        self.random, self.decide, self.faults = random.Random(seed), decide, faults
        self.deal = deal or dealt
        self.now, self.step_number = 1_000_000, 0
        # What a clock tells in µs: never twice the same.
        self.moments = count(1)
        # How often an answer is lost.
        self.lost = 0.0
        self.sales = 0
        self.shards = [Shard(self) for _ in range(shards)]
        self.names = self._new_names()
        for shard, name in zip(self.shards, self.names, strict=True):
            shard.log.sale = name
            shard.wrote()
            shard.acknowledge(shard.position)
        self.actors: list[Actor] = []
        # By movement, the units on record; those that are surely applied everywhere; order ids.
        self.movements: dict[int, int] = {}
        self.applied: set[int] = set()
        self.orders = 0
        self.promised: dict[int, int] = {}
        self.outcomes: list[str] = []
        # When, in steps, nothing was in reach the last time, and the last calamity.
        self.empty_at, self.calamity_at = 0, 0
        self.in_reach_since: int | None = None
        # Shards that were told of units which are there without a break since.
        self.told: set[int] = set()

    def _new_names(self) -> list[str]:
        self.sales += 1
        return [f"{self.sales}/{len(self.shards)}/{shard}" for shard in range(len(self.shards))]

    # What programs do.

    def start(self, steps: Iterator, answered: Callable[[object], None] = lambda _: None) -> Actor:
        self.actors.append(Actor(self, steps, answered))
        return self.actors[-1]

    def restock(self, units: int) -> None:
        number = len(self.movements) + 1
        self.movements[number] = units
        self.start(self._restock(number))

    def _restock(self, number: int):
        names, parts = self.names, self.deal(self.movements[number], number, len(self.shards))
        asks = [
            Ask(shard, "move", PRODUCT, (names[shard], number, units), sure=True)
            for shard, units in enumerate(parts)
            if units
        ]
        answers = yield asks
        if None in answers or names is not self.names:
            return
        self.applied.add(number)
        calamity = self.calamity_at
        told = yield from self._unseal()
        if self.calamity_at == calamity and self.free_in_reach():
            self.told = told

    def _unseal(self):
        # The answers are not looked at by those who unseal; here they say who was told.
        steps = self.decide.unseal(len(self.shards), PRODUCT)
        answers = yield next(steps)
        return {shard for shard, answer in enumerate(answers) if answer}

    def shop(self, shard: int, units: int = 1) -> Actor:
        self.orders += 1
        return self.start(self._shop(shard, units, self.orders), self.outcomes.append)

    def _shop(self, shard: int, units: int, order: int):
        """Buy as the lane does: claim, have units fetched, claim again."""
        names, found, gather = self.names, None, True
        while True:
            ask = Ask(shard, "claim", PRODUCT, (names[shard], order, units, found), sure=True)
            asked_at = self.now
            (answer,) = yield [ask]
            if answer == "accepted":
                self.promised[order] = units
                return "accepted"
            if answer == "refused":
                if units == 1:
                    self._check_refusal(asked_at)
                return "refused"
            if answer is None:
                return "unknown"
            began = self.step_number
            pulled = yield from self.decide.pull(names, shard, PRODUCT, units, gather)
            if pulled.rest:
                self.start(dealing.ask_once(pulled.rest))
            found, gather = pulled.found, False
            if found == 0 and pulled.final and self.calamity_at < began > self.empty_at:
                raise Broken("'sold out', and at no moment of the scan was nothing in reach")

    def finish(self, late_ms: int = dealing.LATE_MS) -> None:
        for source in range(len(self.shards)):
            self.start(self.decide.finish(self.names, source, late_ms))

    # What happens to them.

    def calamity(self) -> None:
        self.calamity_at = self.step_number
        self.told = set()

    def fail_over(self, shard: int, oldest: bool = False) -> None:
        """Have a replica in a shard's place, which has what was acknowledged and maybe more."""
        self.shards[shard].fail_over(oldest)
        self.calamity()

    def toggle(self, shard: int) -> None:
        self.shards[shard].up = not self.shards[shard].up
        self.calamity()

    def crash(self) -> None:
        if self.actors:
            self.actors.pop(self.random.randrange(len(self.actors)))

    def rebuild(self) -> None:
        """Make the sale anew, as PostgreSQL has it: all orders are stored, nothing is lent."""
        if not all(shard.up for shard in self.shards):
            return
        orders = [dict(shard.log.orders) for shard in self.shards]
        kept = [shard.log.movements for shard in self.shards]
        moved = sum(shard.log.moved for shard in self.shards)
        self.names = self._new_names()
        free = self.deal(moved - sum(sum(of.values()) for of in orders), 0, len(self.shards))
        for shard, name in enumerate(self.names):
            one = self.shards[shard]
            units = free[shard] + sum(orders[shard].values())
            one.log = Log(name, free[shard], units, orders[shard], kept[shard])
            one.wrote()
            one.acknowledge(one.position)
            one.sealed, one.unsealed = 0, 0
        self.calamity()

    def step(self) -> bool:
        """Let one of the programs do its next step; False when all are at their end."""
        self.actors = [actor for actor in self.actors if not actor.ended]
        ready = [actor for actor in self.actors if actor.ready()]
        if not ready:
            if self.actors:
                self.pass_time(5)
            return bool(self.actors)
        self.random.choice(ready).step()
        self.step_number += 1
        self.look()
        return True

    def pass_time(self, ms: int) -> None:
        self.now += ms
        self.look()

    def run(self) -> None:
        while self.step():
            pass

    # What must hold.

    def free_in_reach(self) -> int:
        return sum(shard.log.free for shard in self.shards if shard.up)

    def on_their_way(self) -> int:
        return sum(
            units
            for source, shard in enumerate(self.shards)
            for number, (to, units, _) in shard.log.entries.items()
            if shard.up and self.shards[to].up and (source, number) not in self.shards[to].log.given
        )

    def look(self) -> None:
        free = self.free_in_reach()
        if not free:
            self.told = set()
            self.in_reach_since = None
            if not self.on_their_way():
                self.empty_at = self.step_number
        elif self.in_reach_since is None:
            self.in_reach_since = self.now
        told = [self.shards[shard] for shard in self.told]
        if any(shard.sealed > self.now and not shard.away for shard in told):
            raise Broken("sealed, and a restock that was answered has units left")
        for shard in self.shards:
            if shard.log.free < 0:
                raise Broken("fewer than no units are free")
        sold = sum(sum(shard.log.orders.values()) for shard in self.shards)
        if sold > sum(self.movements.values()):
            raise Broken(f"oversold: {sold} of {sum(self.movements.values())}")

    def _check_refusal(self, asked_at: int) -> None:
        since = self.in_reach_since
        if since is not None and asked_at - since > PROMISED_MS:
            raise Broken("refused, with a unit in reach for more than a second")

    def check_end(self) -> None:
        """Let everything come to its end, sell what is left, and count."""
        self.lost = 0.0
        for shard in self.shards:
            shard.up = True
        self.calamity()
        self.run()
        for number in self.movements.keys() - self.applied:
            self.start(self._restock(number))
        self.run()
        self.finish(late_ms=0)
        self.run()
        units = sum(self.movements.values())
        held = sum(shard.log.free + sum(shard.log.orders.values()) for shard in self.shards)
        if held != units:
            raise Broken(f"{units} were put on sale, {held} are sold or free")
        for order, bought in self.promised.items():
            if sum(shard.log.orders.get(order, 0) for shard in self.shards) != bought:
                raise Broken(f"order {order} was promised, and is nowhere")
        last = deque(range(len(self.shards)))
        while last:
            before = len(self.outcomes)
            self.shop(last[0])
            self.run()
            assert len(self.outcomes) == before + 1
            last.rotate() if self.outcomes[-1] == "accepted" else last.popleft()
        sold = sum(sum(shard.log.orders.values()) for shard in self.shards)
        if sold != units:
            raise Broken(f"{sold} of {units} were sold to shoppers who asked for one")


def dealt(units: int, first: int, shards: int) -> list[int]:
    """Return each shard's part of so many units; what remains goes round from `first` on."""
    each, more = divmod(units, shards)
    return [each + ((shard - first) % shards < more) for shard in range(shards)]


def live(world: World, steps: int = 120) -> None:
    """Let anything happen in a world for so many steps, and check it at its end."""
    r = world.random
    shards = len(world.shards)
    world.lost = r.choice((0.0, 0.0, 0.02, 0.1))
    calamities = r.choice((0.0, 0.02, 0.06, 0.15))
    world.restock(r.randrange(1, 3 * shards))
    for _ in range(steps):
        x = r.random()
        if x < 0.10:
            world.shop(r.randrange(shards), r.choice((1, 1, 1, 2, 3)))
        elif x < 0.13:
            world.restock(r.randrange(1, shards + 2))
        elif x < 0.16:
            world.pass_time(r.choice((1, 20, 110, 400, 600)))
        elif x < 0.18:
            # Somebody may have died in the middle of a pull, and nobody has seen it yet.
            world.pass_time(r.choice((0, 110)))
            world.finish()
        elif x < 0.18 + calamities:
            r.choice((world.crash, world.crash, world.rebuild))()
        elif x < 0.18 + 2 * calamities:
            world.fail_over(r.randrange(shards))
        elif x < 0.18 + 2.4 * calamities:
            world.toggle(r.randrange(shards))
        else:
            for _ in range(r.randrange(1, 20)):
                world.step()
    world.check_end()


def go_on_from_what_no_replica_has(world: World) -> None:
    """A puller dies before the replicas have what it took; another goes on; the node dies, too."""
    world.restock(2)
    world.run()
    world.shop(0)
    world.run()
    puller = world.shop(0).step_until("take")
    puller.ask(0)
    world.actors.clear()
    world.pass_time(dealing.LATE_MS)
    world.finish()
    world.run()
    world.fail_over(1, oldest=True)
    world.check_end()


def a_unit_passes_the_scan(world: World) -> None:
    """One unit stays on its way; another is put on sale behind a scan, and bought before it."""
    world.restock(1)
    world.run()
    if world.shards[1].log.free != 1:
        raise Broken("the first movement's rest goes to the second shard")
    world.shop(0).step_until("take").ask(0)
    world.actors.clear()
    scan = world.shop(2).step_until("scan")
    scan.step_at(1)
    world.shards[1].run(Ask(1, "move", PRODUCT, (world.names[1], 9, 1)))
    world.movements[9] = 1
    world.applied.add(9)
    buyer = world.shop(0)
    while not buyer.ended:
        buyer.step()
    world.look()
    scan.step_at(0)
    scan.step_at(2)
    world.run()
    world.check_end()


# With the number of shards that each needs.
SCENARIOS = ((go_on_from_what_no_replica_has, 2), (a_unit_passes_the_scan, 3))


def rush(seed: int, shards: int = 24, units: int = 100, shoppers: int = 200) -> list[str]:
    """Let shoppers come at once who want one each; return what each was told."""
    world = World(seed, shards)
    world.restock(units)
    world.run()
    for shopper in range(shoppers):
        world.shop(world.random.randrange(shards))
        for _ in range(world.random.randrange(0, 12) if shopper % 7 else 0):
            world.step()
    world.run()
    world.check_end()
    return world.outcomes[:shoppers]


assert SEAL_MS <= PROMISED_MS
