"""How long a drill goes on: `make drills` in CI, `make drills LONG=1` by hand."""

import os

LONG = os.environ.get("LONG") == "1"


def often(usual: int, long: int) -> int:
    return long if LONG else usual
