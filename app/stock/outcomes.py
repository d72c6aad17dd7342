"""The words by which claim.lua tells what became of a claim, and under which they are counted."""

# What claims are refused for, or answered with again: counted in the product's hash, or in one for
# all where the product is unknown.
REFUSALS = (
    "sold_out", "insufficient", "capped", "not_open", "paused", "ended", "too_many",
    "replayed", "mismatched", "limited", "limited_address", "overloaded", "unknown",
    "limited_network", "limited_early", "capped_address", "price_changed", "order_ended",
)  # fmt: skip
# Sold or not, everything that is counted.
OUTCOMES = ("accepted", *REFUSALS)
# Nothing is decided, nor counted: this Redis holds no sale.
UNPREPARED = "unprepared"
# Something in Redis did not let it be decided: nothing was sold, and nothing is left of it.
UNDONE = "undone"
# Nothing is decided, nor counted: other shards are to be asked first.
DRY = "dry"
