"""Every outcome of claim.lua has its word in one list, its counter, its answer and its rate."""

import re

from app.config import ROOT
from app.stock.outcomes import DRY, OUTCOMES, REFUSALS, UNDONE, UNPREPARED
from app.watch import samples
from app.web import lane

SCRIPT = re.sub(r"--.*", "", (ROOT / "app/stock/lua/claim.lua").read_text())
LITERAL = re.compile(r"""['"]([a-z_]{3,})['"]""")


def test_the_script_tells_every_outcome():
    assert {*OUTCOMES, DRY, UNDONE, UNPREPARED} <= set(LITERAL.findall(SCRIPT))


def test_the_script_tells_no_other_outcome():
    """Looks where one is chosen, returned first, or counted."""
    places = re.findall(
        r"\boutcome\b[^=\n]*=(.*)|return\s*\{(\s*['\"]\w+['\"])|counters,(.*)", SCRIPT
    )
    told = {word for place in places for text in place for word in LITERAL.findall(text)}
    assert len(told) > 10
    assert told <= {*OUTCOMES, DRY, UNDONE, UNPREPARED}


def test_every_refusal_has_an_answer():
    answers = {word.decode() for word in lane.REFUSALS}
    # The lane puts these together itself: they tell an order or a price.
    assert answers == {*REFUSALS, UNPREPARED} - {"replayed", "order_ended", "price_changed"}


def test_every_outcome_is_part_of_one_rate():
    """But for unknown products, which have no counters of their own."""
    words = [word for name, words in samples.RATES.items() if name != "persisted" for word in words]
    assert sorted(words) == sorted({*OUTCOMES} - {"unknown"})
