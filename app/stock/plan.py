"""Which node of a cluster has which shard, and what is unwise about it."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import redis
from redis.crc import key_slot

from ..problems import Unavailable
from .servers import Address
from .shard import Shard


class Placed(NamedTuple):
    """Where a shard is."""

    shard: int
    slot: int
    primary: Address
    replicas: list[Address]


def placed(shards: Sequence[Shard]) -> list[Placed] | None:
    """Return where each shard is now; None where there is no cluster. Raises Unavailable."""
    found = []
    for shard in shards:
        cluster = shard.server.cluster
        if cluster is None:
            return None
        slot = key_slot(shard.keys.prefix.encode())
        try:
            of = next(of for of in cluster.slots() if of.first <= slot <= of.last)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        except StopIteration:
            raise Unavailable(f"no node has slot {slot}, of shard {shard.part.shard}") from None
        found.append(Placed(shard.part.shard, slot, of.primary, of.replicas))
    return found


def warnings(plan: Sequence[Placed], replicas: int) -> list[str]:
    """Return what is unwise, in a sale whose orders so many replicas must have."""
    found = []
    on = Counter(place.primary for place in plan)
    if max(on.values()) > min(on.values()):
        counts = ", ".join(f"{host}:{port} {count}" for (host, port), count in sorted(on.items()))
        found.append(f"the nodes have different numbers of shards: {counts}")
    if len(on) == 1 and len(plan) > 1:
        found.append("all shards are on one node")
    for primary in sorted(on):
        have = {len(place.replicas) for place in plan if place.primary == primary}
        name, most = "{}:{}".format(*primary), max(have)
        if most < replicas:
            found.append(f"{name} has {most} replicas, REDIS_REPLICAS asks for {replicas}")
        elif most > replicas > 0:
            found.append(
                f"{name} has {most} replicas, REDIS_REPLICAS is {replicas}: a failover to one that"
                " lags loses answered orders"
            )
        elif not most:
            found.append(f"{name} has no replica: what it holds is away while it is down")
    return found
