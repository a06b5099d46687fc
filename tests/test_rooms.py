"""The street plan of `ml_embed/`: a room imports only from rooms below it."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "ml_embed"
# From the top floor down. Rooms of one floor do not import each other.
FLOORS = (
    ("commands",),
    ("benchmarks",),
    ("training", "reports"),
    ("recipe", "evaluation", "forms"),
    ("inference", "sentence_transformers"),
    ("model_folders",),
    ("model",),
    ("prepare", "kernels", "losses"),
    ("data",),
    ("config", "distributed", "sample_data"),
    ("files",),
    ("errors", "notices"),
)
FLOOR_OF = {room: len(FLOORS) - number for number, rooms in enumerate(FLOORS) for room in rooms}
# The package's doors: `ml_embed/__init__.py` imports the Embedder only when it is asked for.
EXEMPT = ("ml_embed/__init__.py",)


def imports(source: str) -> list[str]:
    """Every module of this package that a file imports, inside functions and under TYPE_CHECKING
    too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] == "ml_embed"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upward(path: Path, source: str) -> list[str]:
    """The imports of a file that do not lead downwards or stay in its room."""
    here = room_of(path)
    found = []
    for name in imports(source):
        parts = name.split(".")
        there = parts[1] if len(parts) > 1 else "__init__"
        if there != here and FLOOR_OF.get(there, len(FLOORS) + 1) >= FLOOR_OF[here]:
            found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def modules() -> list[Path]:
    return [
        path for path in sorted(PACKAGE.rglob("*.py")) if str(path.relative_to(ROOT)) not in EXEMPT
    ]


def test_no_import_runs_upward():
    assert [
        line for path in modules() for line in upward(path, path.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "from ml_embed.training.loop import train",
        "import ml_embed.losses.nested",
        "def f():\n    from ml_embed.kernels import attention",
        "if TYPE_CHECKING:\n    from ml_embed.model import MatryoshkaEncoder",
        "from ml_embed import Embedder",
    ],
)
def test_an_import_that_runs_upward_or_sideways_is_seen(line):
    assert len(upward(PACKAGE / "prepare" / "example.py", line)) == 1
    assert not upward(PACKAGE / "prepare" / "example.py", "from ml_embed.data.store import Store")


def test_every_file_stands_in_a_known_room():
    assert {room_of(path) for path in modules()} == FLOOR_OF.keys()
    top = [path.name for path in PACKAGE.glob("*.py")]
    assert len(top) <= 6, "what has a subject of its own stands in a room"


def test_the_page_shows_the_same_floors():
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", page, flags=re.MULTILINE)
    assert {room: int(floor) for floor, room in shown} == FLOOR_OF


def test_every_room_says_what_it_is_for():
    for room in {path.parent for path in modules()}:
        doc = importlib.import_module(
            f"ml_embed.{room.name}" if room != PACKAGE else "ml_embed"
        ).__doc__
        summary = (doc or "").strip().partition("\n")[0]
        assert summary.endswith("."), f"{room}/__init__.py has no docstring of one line"


def test_tests_stand_in_the_rooms_of_what_they_test():
    rooms = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")} - {"tests"}
    assert rooms <= FLOOR_OF.keys() | {"scripts"}


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").split(".")[-1].startswith(("test_", "conftest")), (
                f"{path} imports {module}"
            )
