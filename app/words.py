"""How people are told a number of things."""


def counted(number: int, what: str) -> str:
    """1, order → "1 order"; 1200, order → "1,200 orders"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
