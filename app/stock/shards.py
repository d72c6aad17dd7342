"""Into how many parts a sale is dealt, and what the parts are called.

A shard is a set of keys with a tag of its own, so that a cluster puts it on one node. One that a
shopper belongs to (place.py) has everything that a claim of theirs touches.
"""

from typing import NamedTuple

# A tag's slot is its CRC16, so that numbers as they come lie badly: of {0} … {15} on 8 equal nodes
# four would have four each and four none. These were searched for: any count's tags are spread
# evenly over 2, 3, 4, 6, 8 or 12 nodes of equal slots, wherever that divides the count.
TAGS = (
    "0", "62", "53", "40", "10", "25", "3", "61", "50", "43", "11", "24",
    "2", "60", "51", "42", "12", "27", "1", "63", "52", "41", "13", "114",
)  # fmt: skip


def tag_of(shard: int, shards: int) -> str:
    """Return the tag of a shard's keys. The first one's is 0 in every sale."""
    return TAGS[shard * len(TAGS) // shards]


class Part(NamedTuple):
    """One shard, by its number from 0, of a sale of so many."""

    shard: int = 0
    shards: int = 1

    @property
    def tag(self) -> str:
        return tag_of(self.shard, self.shards)

    @property
    def suffix(self) -> str:
        """What a generation's name ends with here: nothing in a sale of one shard."""
        return f"/{self.shards}/{self.shard}" if self.shards > 1 else ""

    def generation(self, sale: str) -> str:
        """Return the name of the sale (as on record) that Redis has in this shard.

        It says which shard of how many, and scripts compare it, so that a process which deals the
        shoppers to another number of shards decides nothing.
        """
        return f"{sale}{self.suffix}"

    def sale_of(self, generation: str) -> str:
        """Return the name on record of what Redis has here; another part's is no sale's name.

        Of a part that is closed there is none: an empty text, as of a Redis without a sale.
        """
        if not generation or generation.endswith(self.suffix):
            return generation.removesuffix(self.suffix)
        return f"{generation} of another number of shards"

    def first_id(self, first: int) -> int:
        """Return this shard's first order id in a sale that begins at `first`, a multiple."""
        return first + self.shard if self.shards > 1 else first

    def allows(self, limit: int) -> int:
        """Return what this shard allows of a limit that is for all of them; 0 where there is none.

        A quarter more than its share, since those who share an address are not spread evenly.
        """
        return limit if self.shards == 1 else -(-5 * limit // (4 * self.shards))

    def deals(self, units: int, first: int = 0) -> int:
        """Return this shard's part of units, which are dealt evenly; the rest from `first` on."""
        each, rest = divmod(units, self.shards)
        return each + ((self.shard - first) % self.shards < rest)


WHOLE = Part()


def first_above(above: int, shards: int) -> int:
    """Return where order ids begin above an id: with one shard the next, else a multiple."""
    return above + 1 if shards == 1 else (above // shards + 1) * shards
