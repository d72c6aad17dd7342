"""Claims of an event loop: those of one turn are decided together."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import hiredis

from ..breaker import Breaker
from ..problems import Unavailable, Unprepared
from .channel import Channel, connect
from .claims import (
    AGAIN_SECONDS,
    COMPARE_SECONDS,
    DRY,
    LIMITED,
    MOST_AT_ONCE,
    PROMISES,
    UNDONE,
    Batch,
    Claim,
    ClaimScript,
    OnRecord,
    Request,
    Tell,
    Undone,
    ignore,
    refused,
    tell_one,
)
from .replicas import Unreplicated
from .servers import COMMAND_TIMEOUT_SECONDS, UNFIT, Server, code_of

# A process that nobody asks for a purchase looks for Redis by itself, less often.
RECONNECT_SECONDS = 1.0


class LoopLine:
    """Claims of one event loop, over one connection: those of one turn are decided together.

    A turn has more of them the busier the process is, and more in one batch cost less each.
    """

    def __init__(self, server: Server, script: ClaimScript, on_record: OnRecord) -> None:
        self._server = server
        self.script = script
        self._replicas = script.replicas
        self._on_record = on_record
        # What goes out at the end of this turn of the loop.
        self._gathered: Batch = []
        # Batches that wait for replicas. Other claims gather meanwhile, and cost less together.
        self._in_flight = 0
        self._on_limited: Callable[[Request, Claim], None] = lambda request, claim: None
        self._on_dry: Callable[[Request, Claim, Tell], None] = lambda _, claim, tell: tell(claim)
        self._channel: Channel | None = None
        self._opening: asyncio.Task[Channel] | None = None
        # After a failure nobody connects for a moment.
        self._breaker = Breaker(COMMAND_TIMEOUT_SECONDS)
        self._reconnects: asyncio.TimerHandle | None = None
        # Whether PostgreSQL could tell what Redis must hold, and when it was asked last.
        self._verified = False
        self._compared_at = 0.0

    def tell_limited(self, tell: Callable[[Request, Claim], None]) -> None:
        """Have it told of users who are over their limit."""
        self._on_limited = tell

    def tell_dry(self, go_on: Callable[[Request, Claim, Tell], None]) -> None:
        """Have `go_on` look after claims that are dry, and tell them in the end."""
        self._on_dry = go_on

    async def claim(self, request: Request) -> Claim:
        """Decide one purchase. Raises Unavailable when Redis gave no answer."""
        future = asyncio.get_running_loop().create_future()
        self.ask(request, lambda result: None if future.done() else future.set_result(result))
        result = await future
        if isinstance(result, Exception):
            raise result
        return cast("Claim", result)

    def ask(self, request: Request, tell: Tell) -> None:
        """Decide one purchase; `tell` is called with the claim or with Unavailable, later."""
        gathered = self._gathered
        gathered.append((request, tell))
        if len(gathered) == MOST_AT_ONCE:
            self._send()
        elif len(gathered) == 1:
            # What else is asked in this turn of the loop goes along.
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        if self._in_flight or not self._gathered:
            return
        batch, self._gathered = self._gathered, []
        if len(batch) > MOST_AT_ONCE:
            # Some had to wait for replicas.
            batch, self._gathered = batch[:MOST_AT_ONCE], batch[MOST_AT_ONCE:]
        channel = self._channel
        if channel is None or channel.lost:
            reach = asyncio.get_running_loop().create_task(self._reach())
            reach.add_done_callback(partial(self._reached, batch, False))
        else:
            self._decide(channel, batch)
        if self._gathered:
            self._send()

    def _reached(self, batch: Batch, again: bool, reach: asyncio.Task[Channel]) -> None:
        error = None if reach.cancelled() else reach.exception()
        if isinstance(error, Unavailable):
            self._tell(batch, error)
        elif error or reach.cancelled() or reach.result().lost:
            self._tell(batch, Unavailable("the connection to Redis was lost", executed=False))
        else:
            self._decide(reach.result(), batch, again)

    def _decide(self, channel: Channel, batch: Batch, again: bool = False) -> None:
        """Send a batch; `again` that it was sent before, and surely nothing of it ran."""
        command = self.script.command(*[request for request, _ in batch])
        if not self._replicas.count:
            channel.send(command, partial(self._answered, channel, batch, again, None))
            return
        promised: list[tuple[Tell, Claim]] = []
        self._in_flight += 1
        channel.send(
            command + self._replicas.wait,
            partial(self._answered, channel, batch, again, promised),
            partial(self._copied, channel, promised),
        )

    def _answered(
        self,
        channel: Channel,
        batch: Batch,
        again: bool,
        promised: list[tuple[Tell, Claim]] | None,
        answer: object,
    ) -> None:
        if isinstance(answer, list):
            undone = self._tell(batch, answer, promised)
            if not undone:
                return
            channel.retire()
            self._server.leave()
            self._once_more(undone, again, Undone("READONLY"))
        elif isinstance(answer, hiredis.ReplyError):
            code = code_of(answer)
            if code == "NOSCRIPT" and not again and not channel.lost:
                # Nothing ran, so sending again is safe.
                channel.send(self.script.load, ignore)
                self._decide(channel, batch, again=True)
            elif code in UNFIT:
                channel.retire()
                self._server.leave()
                self._once_more(batch, again, answer)
            else:
                self._tell(batch, refused(answer))
        else:
            self._tell(batch, cast("Exception", answer))

    def _once_more(self, batch: Batch, again: bool, error: Exception) -> None:
        """Send what surely has not run to the server that may be in that one's place by now."""
        if again:
            self._tell(batch, refused(error))
            return
        loop = asyncio.get_running_loop()
        reach = loop.create_task(asyncio.wait_for(self._reach(), AGAIN_SECONDS))
        reach.add_done_callback(partial(self._reached, batch, True))

    def _copied(self, channel: Channel, promised: list[tuple[Tell, Claim]], answer: object) -> None:
        """Tell of the orders which a batch promises, now that replicas have them or do not."""
        self._in_flight -= 1
        enough = self._replicas.enough(answer)
        if not enough:
            # Connecting anew finds out whether there are enough again.
            self._breaker.waited_in_vain()
            channel.retire()
        for tell, claim in promised:
            tell_one(tell, claim if enough else Unreplicated(answer))
        self._send()

    def _tell(
        self,
        batch: Batch,
        answer: list[Any] | Exception,
        promised: list[tuple[Tell, Claim]] | None = None,
    ) -> Batch:
        """Tell each of the batch what became of it; promises are kept back in `promised`.

        Returns those of which nothing ran because the server is unfit; they are not told yet.
        """
        undone: Batch = []
        for number, (request, tell) in enumerate(batch):
            result: Claim | Exception
            if isinstance(answer, list):
                result = Claim._make(answer[number])
                if result.outcome == UNDONE:
                    error = Undone(result.text.decode("utf-8", "replace"))
                    if code_of(error) in UNFIT:
                        undone.append((request, tell))
                        continue
                    result = refused(error)
                elif result.outcome == LIMITED:
                    self._on_limited(request, result)
                elif result.outcome == DRY:
                    self._on_dry(request, result, tell)
                    continue
                elif promised is not None and result.outcome in PROMISES:
                    promised.append((tell, result))
                    continue
            else:
                result = answer
            tell_one(tell, result)
        return undone

    async def run(self, command: bytes, sure: bool) -> Any:
        """Return a script's answer; `sure`, once replicas have what it wrote and what it read.

        Raises Unavailable, also when too few replicas answer: then it is done all the same.
        """
        channel = self._channel
        if channel is None or channel.lost:
            channel = await self._reach()
        sure = sure and bool(self._replicas.count)
        answered, tell = channel.awaited()
        moved, tell_moved = channel.awaited()
        copied, tell_copied = channel.awaited()
        if sure:
            fence = self._replicas.fence
            channel.send(command + fence, tell, ignore, tell_moved, tell_copied)
        else:
            channel.send(command, tell)
        answer = await answered
        if isinstance(answer, hiredis.ReplyError):
            if code_of(answer) in UNFIT:
                channel.retire()
                self._server.leave()
            raise refused(answer)
        if sure and (await moved != 1 or not self._replicas.enough(await copied)):
            raise Unreplicated(await copied)
        return answer

    async def check(self) -> bool:
        """Return whether the sale was compared with PostgreSQL; if not, try it now and then.

        Raises Unavailable when a claim would find Redis unable to decide it.
        """
        channel = self._channel
        if channel is None or channel.lost:
            channel = await self._reach()
        answer = await channel.ask(self.script.try_adding)
        if isinstance(answer, hiredis.ReplyError):
            if code_of(answer) in UNFIT:
                channel.retire()
            raise refused(answer)
        held, _ = await channel.ask_well(self.script.ask_sale)
        if held is None:
            raise Unprepared("the sale is not in Redis")
        if not self._verified and time.monotonic() - self._compared_at > COMPARE_SECONDS:
            try:
                await self._compare(channel)
            except Unprepared:
                channel.abort()
                raise
        return self._verified

    async def _compare(self, channel: Channel) -> None:
        """Raise Unprepared when Redis does not hold the sale that PostgreSQL knows."""
        self._compared_at = time.monotonic()
        # First PostgreSQL, then Redis: the ids on record were issued before Redis is asked.
        record = await asyncio.get_running_loop().run_in_executor(None, self._on_record)
        self.script.check_sale(record, *await channel.ask_well(self.script.ask_sale))
        self._verified = record is not None

    async def _reach(self) -> Channel:
        """Connect, once for all who wait. Raises Unavailable, for a while at once."""
        if not self._breaker.admits():
            raise Unavailable("Redis was unreachable a moment ago", executed=False)
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> Channel:
        channel = None
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                channel = await connect(self._server)
                await channel.ask_well(self.script.load)
                await channel.ask_well(self.script.try_writing)
                if self._replicas.count:
                    await self._try_replicas(channel)
                await self._compare(channel)
        except (Unavailable, OSError, TimeoutError) as error:
            self._breaker.waited_in_vain()
            if channel:
                channel.abort()
            self._reconnect_later()
            if isinstance(error, Unavailable):
                error.executed = False
                raise
            raise Unavailable(f"Redis can't be reached: {error}", executed=False) from error
        finally:
            self._opening = None
        self._breaker.answered()
        self._channel = channel
        channel.on_lost = self._reconnect_later
        return channel

    async def _try_replicas(self, channel: Channel) -> None:
        """Raise Unreplicated when too few replicas have all that there is."""
        copied, tell = channel.awaited()
        # A fence that could not be made or moved is told by the next claim's own writes.
        channel.send(self._replicas.fence, ignore, ignore, tell)
        if not self._replicas.enough(answer := await copied):
            raise Unreplicated(answer)

    def _reconnect_later(self) -> None:
        """Don't leave it to a shopper to find Redis again."""
        if self._reconnects is None:
            loop = asyncio.get_running_loop()
            self._reconnects = loop.call_later(RECONNECT_SECONDS, self._reconnect)

    def _reconnect(self) -> None:
        self._reconnects = None
        if self._opening is None and (self._channel is None or self._channel.lost):
            self._opening = asyncio.create_task(self._open())
            # Nobody may be waiting to be told.
            self._opening.add_done_callback(lambda opening: opening.exception())
