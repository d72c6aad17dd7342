"""PostgreSQL's advisory locks: every one there is, and the order in which they are taken.

Whoever needs several takes them from the top down, so that no two wait for each other; tables are
locked after them, and to read one is to lock it against a reset: first in a transaction stands the
lock. What only tries a lock, and goes away where it is held, may do so at any point.
Nothing else here may use the numbers.
"""

# `flask prepare`: of several programs that start at once, one migrates. Held alone.
PREPARE_LOCK = 7_316_002
# A rebuild or a reset of the sale.
REBUILD_LOCK = 7_316_004
# A repair of the ledger: two at once would take the same units twice.
REPAIR_LOCK = 7_316_005
# Held shared by drains, alone by whoever needs that no order is stored meanwhile.
DRAIN_LOCK = 7_316_001
# Of a shard by (this, its number), in PostgreSQL's space of pairs: one drainer at a time.
SHARD_DRAIN_LOCKS = 7_316_008
# Who numbers events, makes their partitions or drops them: one writer, for all of the feed.
EVENTS_LOCK = 7_316_006
# Held shared while a movement is carried out or a dead letter replayed, alone while the sale in
# Redis is replaced: what was applied to the old sale is never marked as applied to the new one.
SALE_LOCK = 7_316_003
# Of an endpoint of webhooks, by (this, its id) in PostgreSQL's space of pairs: one sender at a
# time, for as long as its session lives. Held alone.
WEBHOOK_LOCKS = 7_316_007
