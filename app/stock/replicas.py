"""What may not leave a Redis before its replicas have it.

Replication is in order: replicas that have acknowledged a write have all before it. WAIT looks at
the writes of its own connection alone (https://valkey.io/commands/wait), so that after a mere read
it returns at once, whatever others have just written. Hence the fence: a write and WAIT in one go,
on the connection that has read or written what is to be sure.
"""

from typing import Any

import redis

from ..problems import Unavailable
from .keys import Keys
from .servers import pack

Command = tuple[str, ...]

# Replicas mostly need 1 ms. Less than what a command may take (servers.py), so that a late replica
# is not mistaken for a dead primary.
WAIT_MS = 500
# To put off the end of a key is a write that Redis takes however short of memory it is. 30 years.
FENCE_MS = 1_000_000_000_000


class Unreplicated(Unavailable):
    """Too few replicas have it: what was done is done, and may be lost with the primary."""

    def __init__(self, found: object) -> None:
        super().__init__(f"NOREPLICAS only {found} answered in time")


class Replicas:
    """How many replicas must have what is promised; 0 leaves everything as it is without any."""

    def __init__(self, count: int, keys: Keys) -> None:
        self.count = count
        make_fence: Command = ("SET", keys.fence, "1", "NX")
        fence: Command = ("PEXPIRE", keys.fence, str(FENCE_MS))
        wait: Command = ("WAIT", str(count), str(WAIT_MS))
        # Follows a claim, which is a write or a fence itself.
        self.wait = pack(*wait) if count else b""
        # In one go, on the connection that has read or written what is to be sure.
        self.commands = (make_fence, fence, wait)
        # What a new connection is asked first; 3 answers.
        self.fence = b"".join(pack(*command) for command in self.commands)

    def enough(self, answer: object) -> bool:
        """Return whether this answer to WAIT says that enough replicas have it."""
        return isinstance(answer, int) and answer >= self.count

    def run(self, pipe: Any) -> list[Any]:
        """Return the answers of a pipeline's commands, of redis-py, once replicas have it all.

        Raises Unreplicated, and redis.RedisError as the pipeline does.
        """
        if not self.count:
            return list(pipe.execute())
        for command in self.commands:
            pipe.execute_command(*command)
        *answers, _, fenced, copied = pipe.execute(raise_on_error=False)
        for answer in (*answers, fenced, copied):
            if isinstance(answer, redis.RedisError):
                raise answer
        if fenced != 1 or not self.enough(copied):
            raise Unreplicated(copied)
        return list(answers)
