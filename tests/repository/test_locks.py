"""The lock files hold what is asked for: each package once, with its hashes, and no address."""

import re

import pytest
from locks import pinned

from app.config import ROOT

LOCKS = {
    "requirements.lock": ("requirements.txt",),
    "requirements-dev.lock": ("requirements.txt", "requirements-dev.txt"),
    "requirements-image.lock": (),
}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_what_is_asked_for(lock):
    locked = pinned(lock)
    for requirements in LOCKS[lock]:
        for package, versions in pinned(requirements).items():
            assert locked.get(package) == versions, f"{package}: run make lock"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_hashes_and_no_address(lock):
    text = (ROOT / lock).read_text()
    packages = re.split(r"\n(?=[\w.-]+(?:\[\w+\])?==)", text)[1:]
    assert len(packages) > 30
    for package in packages:
        assert "--hash=sha256:" in package, package
    assert not re.search(r"://|--index|--find-links|@ ", text)


def test_all_locks_agree():
    """What is tested is what is run, and what is in the image."""
    run = pinned("requirements.lock")
    for lock in ("requirements-dev.lock", "requirements-image.lock"):
        both = pinned(lock)
        assert {name: both[name] for name in both.keys() & run.keys()} == {
            name: run[name] for name in both.keys() & run.keys()
        }
    assert run.keys() - pinned("requirements-dev.lock").keys() == set()
