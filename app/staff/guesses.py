"""Counts of wrong passwords: guessing is slow, and nobody shuts another person out.

A browser that a person has signed in with (OWASP, "device cookies"), or an address, keeps a count
of its own for this person; everybody else shares one. So strangers who guess use up theirs alone.
"""

import hashlib
import time

import limits

from ..addresses import client_of
from ..extensions import limiter, stock
from ..models import Staff
from ..stock.keys import StaffKeys

# Wrong passwords of one address, whoever's they are meant to be; of one person's in one count.
ADDRESS_LIMIT = limits.parse("20/minute")
PERSON_LIMIT = limits.parse("10/15 minutes")
# An address counts as a person's own for so long after they signed in from it.
KNOWN_ADDRESS_SECONDS = 30 * 24 * 60 * 60
STRANGERS = "strangers"


class TooManyGuesses(Exception):
    """No further password is looked at for so many seconds."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many wrong passwords; again in {seconds} s")
        self.seconds = seconds


class Guess:
    """One try at a password: counted before it is judged, taken back if it was right.

    Tries at the same moment so never exceed a limit, and what is no wrong password does not count.
    Raises TooManyGuesses, and redis.RedisError when nobody can count.
    """

    def __init__(self, person: Staff | None, email: str, counted_as: str, address: str) -> None:
        """`counted_as` names whose count it is; strangers' tries count for the address too."""
        self._counts: list[tuple[limits.RateLimitItem, *tuple[str, ...]]] = [
            (PERSON_LIMIT, _account(person, email), counted_as)
        ]
        if not counted_as.startswith("device"):
            self._counts.insert(0, (ADDRESS_LIMIT, client_of(address)))
        # A Redis that hangs does later what it was sent: it is found out by a question that counts
        # nothing, or its tries would shut out whoever has the right password.
        limiter.limiter.test(PERSON_LIMIT, "limits", "passwords", *self._counts[-1][1:])
        for number, (limit, *names) in enumerate(self._counts):
            if not limiter.limiter.hit(limit, "limits", "passwords", *names):
                self._counts = self._counts[:number]
                self.take_back()
                reset = limiter.limiter.get_window_stats(limit, "limits", "passwords", *names)[0]
                raise TooManyGuesses(max(1, -int(-(reset - time.time()) // 1)))

    def take_back(self) -> None:
        for limit, *names in self._counts:
            limiter.limiter.hit(limit, "limits", "passwords", *names, cost=-1)


def whose(person: Staff | None, device: str | None, address: str) -> str:
    """Return the name of the count for this person's password from this browser and address."""
    if device:
        return f"device {device}"
    if person and stock.jobs_client.exists(StaffKeys.known_address(person.id, client_of(address))):
        return f"address {client_of(address)}"
    return STRANGERS


def know(person: Staff, address: str) -> None:
    """Remember that this person signed in from this address."""
    key = StaffKeys.known_address(person.id, client_of(address))
    stock.jobs_client.set(key, 1, ex=KNOWN_ADDRESS_SECONDS)


def _account(person: Staff | None, email: str) -> str:
    """Name the account in a count: another password begins new counts, which ends every wait."""
    known = f"{person.id} {person.session_key}" if person else f"nobody {email.strip().lower()}"
    return hashlib.sha256(known.encode()).hexdigest()[:32]
