"""Turns away users who are over their limit without asking Redis about each attempt.

Redis tells how long a user's window stays full, and no request in between empties it, so its answer
holds until then. It is believed for a second at most: the sale may have been reset meanwhile. A
request with an Idempotency-Key always goes to Redis, which may know its order.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from ..problems import Unavailable
from .lines import Claim, LoopLine

BELIEVED_SECONDS = 1.0
# Past so many products a second, further ones are counted as unknown.
MOST_PRODUCTS = 1000
# About 15 MB. Beyond it Redis is asked.
MOST_USERS = 100_000
NO_PRODUCT = 0


class Doorkeeper:
    """Stands before an event loop's line to Redis."""

    def __init__(self, line: LoopLine, count: Callable[[dict[int, int]], None]) -> None:
        """`count` is told once a second, in a thread, who was turned away: how many by product."""
        self.line = line
        self._count = count
        # Until when a user is turned away, and until when the window stays full, monotonic.
        self._limited: dict[int, tuple[float, float]] = {}
        self._turned_away: Counter[int] = Counter()
        self._rounds: asyncio.Task[None] | None = None

    async def claim(
        self, user_id: int, product_id: int, quantity: int, key: str | None, address: str
    ) -> Claim:
        """Decide one purchase. Raises Unavailable when Redis gave no answer."""
        if key is None and user_id in self._limited:
            now = time.monotonic()
            believed, full = self._limited[user_id]
            if now < believed:
                known = product_id in self._turned_away or len(self._turned_away) < MOST_PRODUCTS
                self._turned_away[product_id if known else NO_PRODUCT] += 1
                return Claim(b"limited", 0, 0, int((full - now) * 1000) + 1)
        claim = await self.line.claim(user_id, product_id, quantity, key, address)
        if claim.outcome == b"limited" and len(self._limited) < MOST_USERS:
            now, seconds = time.monotonic(), claim.reset_ms / 1000
            self._limited[user_id] = now + min(seconds, BELIEVED_SECONDS), now + seconds
            if self._rounds is None or self._rounds.done():
                self._rounds = asyncio.create_task(self._make_rounds())
        return claim

    async def report(self) -> None:
        """Have those counted who were turned away since the last time."""
        counts, self._turned_away = self._turned_away, Counter()
        if counts:
            try:
                await asyncio.get_running_loop().run_in_executor(None, self._count, counts)
            except Unavailable:
                self._turned_away += counts

    async def _make_rounds(self) -> None:
        while self._limited or self._turned_away:
            await asyncio.sleep(BELIEVED_SECONDS)
            now = time.monotonic()
            self._limited = {user: of for user, of in self._limited.items() if of[0] > now}
            await self.report()
