"""Reads the requirements and their lock files."""

import re

from app.config import ROOT


def pinned(name: str) -> dict[str, set[str]]:
    """Return {package: versions} of a file; several versions, where the Python decides."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(
        r"^([\w.-]+)(?:\[\w+\])?==([^\s;]+)", (ROOT / name).read_text(), re.MULTILINE
    ):
        found.setdefault(package.lower().replace("_", "-"), set()).add(version)
    return found
