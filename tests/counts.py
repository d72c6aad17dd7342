"""What Redis counts by itself."""

from app.extensions import stock


def commandstats() -> dict[str, int]:
    """Return how often each command ran since Redis started, those of scripts included."""
    return {
        name.removeprefix("cmdstat_"): figures["calls"]
        for name, figures in stock.client.info("commandstats").items()
    }
