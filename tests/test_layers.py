"""Imports only go down: read from each module's text, lazy and `TYPE_CHECKING` imports included."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

import nca_align
from nca_align import cli
from nca_align.commands.evaluate import command as evaluate

# From the lowest. Modules of one package import each other freely, but not in a circle; packages of one layer don't.
LAYERS = [
    [
        "losses",
        "own_losses",
        "reward_tensors",
        "config",
        "device",
        "unread",
        "options",
        "help_page",
        "user_functions",
        "errors",
        "processes",
        "progress",
    ],
    ["store"],
    ["pages"],
    ["data"],
    ["batching"],
    ["models"],
    ["rewards", "scorers"],
    ["training"],
    ["trainer"],
    ["evaluation"],
    ["commands.export"],
    ["commands.train", "commands.sample", "commands.score", "commands.env"],
    ["commands.inspect", "commands.evaluate", "commands.report"],
    ["commands.compare"],
    ["", "cli", "__main__"],
]
# single modules side by side, which may import each other
ONE_ROOM = {*LAYERS[0], "scorers", "rewards", "", "cli", "__main__"}
ROOT = Path(nca_align.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in ROOT.rglob("*.py")
}
# modules whose names are put together when the program runs
BY_NAME = {
    "": set(nca_align._HOME.values()),
    "cli": {f"commands.{module}" for module, _ in cli.COMMANDS.values()},
    "commands.evaluate.command": {f"commands.evaluate.{module}" for module, *_ in evaluate.MODES.values()},
}


def imports_of(module: str) -> set[str]:
    """Modules of the package that `module` imports, by their names below `nca_align`."""
    path = MODULES[module]
    here = f"nca_align.{module}".rstrip(".")
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    found = set(BY_NAME.get(module, ()))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            named = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            if name.split(".")[0] == "nca_align":
                inner = name.removeprefix("nca_align").removeprefix(".")
                found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found - {module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def place_of(module: str) -> str:
    """The package that a module belongs to, of the commands each its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "commands" and len(parts) > 1 else parts[0]


def refusal(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`."""
    floors = {place: i for i, layer in enumerate(LAYERS) for place in layer}
    ours, theirs = place_of(module), place_of(imported)
    if (
        ours == theirs
        or floors[theirs] < floors[ours]
        or (floors[theirs] == floors[ours] and {ours, theirs} <= ONE_ROOM)
    ):
        return None
    return "goes up" if floors[theirs] > floors[ours] else "goes sideways"


def circles() -> list[list[str]]:
    """Modules that import each other, by a search in depth."""
    found, path, done = [], [], set()

    def visit(module: str) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        path.append(module)
        for imported in sorted(IMPORTS[module]):
            visit(imported)
        done.add(path.pop())

    for module in MODULES:
        visit(module)
    return found


def test_every_module_has_its_layer():
    places = {place for layer in LAYERS for place in layer} | {"commands"}
    assert {place_of(module) for module in MODULES} <= places
    assert len(IMPORTS["trainer"]) > 5  # the reading works


def test_imports_go_down():
    wrong = [
        f"{module} → {imported} {why}"
        for module, imports in IMPORTS.items()
        for imported in sorted(imports)
        if (why := refusal(module, imported))
    ]
    assert wrong == []


def test_no_circle():
    assert circles() == []


@pytest.mark.parametrize(
    ("module", "imported", "why"),
    [
        ("store.files", "trainer", "goes up"),
        ("commands.train.command", "commands.score", "goes sideways"),
        ("commands.score", "commands.compare.cell", "goes up"),
        ("trainer", "training.metrics", None),
    ],
)
def test_the_rule_itself(module, imported, why):
    assert refusal(module, imported) == why
