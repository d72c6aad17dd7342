"""Python's garbage collector in a process that serves: what was loaded stays as long as it does."""

import gc

# Net new containers between two collections. A request's own objects go by reference count, and so
# do a batch's; looking for cycles every 700 of them, as Python does, cost the web processes 5 % of
# their CPU and the drain half of it.
CONTAINERS = 50_000


def spare_what_is_loaded() -> None:
    """Look what there is over once, then never again, and the rest less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(CONTAINERS)
