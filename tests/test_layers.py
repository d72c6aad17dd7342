"""Who may import whom: edges → use cases → stock | models → extensions."""

import ast

from app.config import ROOT

EDGES = {"lane", "api", "admin", "cli", "jobs"}
# These join edges to the world: the app's factory, the web server's way in, the worker's threads.
JOINTS = {"__init__", "web", "relay"}
APP = ROOT / "app"


def imports_of(path) -> set[str]:
    """Return the top modules of the package that a file imports."""
    found = set()
    depth = len(path.relative_to(APP).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {n.name for n in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("app."):
            found.add(node.module.split(".")[1])
    return found


def modules():
    for path in APP.rglob("*.py"):
        yield path.relative_to(APP).parts[0].removesuffix(".py"), path


def test_edges_never_import_each_other():
    for module, path in modules():
        if module in EDGES:
            others = imports_of(path) & (EDGES - {module})
            assert not others, f"{path.name} imports {others}"


def test_use_cases_never_import_edges():
    for module, path in modules():
        # The relay is the worker's edge: it exists to enqueue jobs. The web server's process puts
        # the lane before the app, as the factory does.
        if module not in EDGES | {"__init__", "web", "relay"}:
            edges = imports_of(path) & EDGES
            assert not edges, f"{path.name} imports {edges}"


def test_stock_and_models_know_nothing_of_each_other():
    assert not imports_of(APP / "stock.py") & {"models", "extensions", "database"}
    assert imports_of(APP / "models.py") == {"extensions"}
    assert imports_of(APP / "extensions.py") <= {"stock", "addresses"}


def test_only_one_module_names_redis_keys():
    for path in APP.rglob("*"):
        if path.suffix in (".py", ".lua") and path.name not in ("stock.py", "keys.py"):
            assert "sale:{" not in path.read_text(), path.name
