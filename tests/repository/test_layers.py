"""Who may import whom: the rooms of docs/architecture.md, and every module stands in one."""

import ast
import importlib

import pytest

from app.config import ROOT

APP = ROOT / "app"

# Each room, and the rooms that it may import; its own is always allowed.
GROUND = {
    "problems",
    "reading",
    "sheet",
    "config",
    "times",
    "addresses",
    "breaker",
    "telling",
    "logs",
    "locks",
    "money",
    "numbers",
    "words",
}
TABLES = GROUND | {
    "extensions",
    "models",
    "audit",
    "idempotency",
    "generation",
    "events",
    "planned",
}
ROOMS = {
    "problems": set(),
    "words": set(),
    "times": {"words"},
    "addresses": set(),
    "breaker": set(),
    "locks": set(),
    "money": {"problems"},
    "numbers": {"money", "problems"},
    "reading": {"problems"},
    "sheet": set(),
    "config": set(),
    "telling": {"config"},
    "logs": {"config", "telling"},
    "run": {"config", "telling"},
    "stock": GROUND,
    "extensions": {"addresses", "database", "stock"},
    "database": {"breaker"},
    "models": {"extensions", "reading"},
    "audit": {"extensions", "models"},
    "generation": {"extensions", "locks", "models"},
    "events": {"extensions", "models"},
    "planned": {"extensions"},
    "idempotency": {"extensions", "models", "problems"},
    "staff": TABLES | {"stock"},
    # Who of the staff is asking.
    "auth": {"audit", "extensions", "staff"},
    "watch": GROUND | {"extensions", "generation", "database", "models", "stock"},
    "products": TABLES | {"stock"},
    "orders": TABLES | {"database", "stock", "products"},
    # Told to the shop: what the others have put on record.
    "feed": TABLES | {"database", "stock", "orders"},
    "books": TABLES | {"database", "stock", "products", "orders", "feed"},
}
BELOW = set(ROOMS) - {"run"}
ROOMS |= {
    # A pulse is written as it is read, and the collector spared as by every program.
    "web": BELOW | {"run"},
    # The pages show errors as the web does, and share their polls with it.
    "admin": BELOW | {"web"},
    # A pulse is written as it is read.
    "worker": BELOW | {"run"},
    "cli": BELOW,
    "__init__": BELOW | {"admin", "cli", "web"},
    # What begins a program.
    "loading": BELOW | {"run", "__init__"},
}


def imports_of(path) -> set[str]:
    """Return the rooms of the package that a file imports."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {(more or ["__init__"])[0] for name, *more in names if name == "app"}
        if not isinstance(node, ast.ImportFrom):
            continue
        module = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            module = package[: len(package) - node.level + 1] + module
        if module[:1] == ("app",):
            names = {module[1]} if module[1:] else {alias.name for alias in node.names}
            # What is no module's name is the package's own.
            found |= {name if name in ROOMS else "__init__" for name in names}
    return found


def room_of(path) -> str:
    return path.relative_to(APP).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(APP.rglob("*.py")), ids=lambda p: str(p.relative_to(APP)))
def test_every_module_stands_in_a_room_and_reaches_only_below(path):
    room = room_of(path)
    assert room in ROOMS, f"{path.name} stands in no room"
    assert imports_of(path) - {room} <= ROOMS[room]


def test_no_room_of_the_table_is_empty():
    assert {room_of(path) for path in APP.rglob("*.py")} == set(ROOMS)


def test_the_package_never_imports_the_programs_that_load_it():
    for path in APP.rglob("*.py"):
        text = path.read_text()
        assert "from wsgi" not in text, path
        assert "import wsgi" not in text, path


def test_only_one_module_names_redis_keys():
    for path in APP.rglob("*"):
        if path.suffix in (".py", ".lua") and path.name != "keys.py":
            assert "sale:{" not in path.read_text(), path.name


# Most of them are run by drills and by people alone.
BESIDE = [
    path
    for folder in (ROOT, ROOT / "stress", ROOT / "docs", ROOT / "migrations")
    for path in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))
    if "node_modules" not in path.parts
]


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_other_programs_import_of_the_package_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "app":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")
