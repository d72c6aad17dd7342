"""Amounts of money, which are whole cents everywhere but on a page."""


def decimal(cents: int, grouping: str = "") -> str:
    """99999 → 999.99; with a comma as `grouping` 123456789 → 1,234,567.89."""
    return f"{cents // 100:{grouping}}.{cents % 100:02}"
