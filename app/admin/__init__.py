"""The pages of the people who run a sale."""

from flask import Flask


def init_app(app: Flask) -> None:
    """Register the pages."""
