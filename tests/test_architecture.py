"""The house guards itself: floors, edges, sizes and circles, read from the imports, lazy ones counted."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"core", "cuda_ext"},
    {
        "models",
        "parallel",
        "data",
        "curation",
        "tokenization",
        "objectives",
        "tasks",
        "optim",
        "checkpoint",
        "cluster",
        "tracking",
    },
    {"engine", "generation", "planning"},
    {"workers", "evaluation"},
    {"stages"},
    {"main"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The package's own front door forwards `run` and the public rooms lazily.
EXEMPT = {ROOT / "framework/__init__.py"}
TOP_LEVEL = {
    "framework", "cuda_ext", "recipes", "launch", "tests", "docs", "setup.py", "README.md", "README.zh.md",
    "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".ci", ".gitignore", ".pre-commit-config.yaml",
    ".github",
}  # fmt: skip
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "base"}


def sources() -> list[Path]:
    return [p for top in ("framework", "cuda_ext") for p in (ROOT / top).rglob("*.py") if "__pycache__" not in p.parts]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "cuda_ext" else parts[1]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import anywhere in the file, and of constant import_module calls."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                here = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                package = ".".join([*here, *filter(None, [node.module])])
            found += [(node.lineno, f"{package}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found += [(node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant)]
    return found


def room_imported(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "cuda_ext":
        return "cuda_ext"
    return parts[1] if parts[0] == "framework" and len(parts) > 1 and parts[1] in FLOOR_OF else None


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room_of(path) for path in sources() if path not in EXEMPT}
    assert rooms <= set(FLOOR_OF)


def test_a_room_imports_only_from_floors_below_its_own() -> None:
    wrong = []
    for path in sources():
        if path in EXEMPT:
            continue
        room = room_of(path)
        for line, module in imports(path):
            other = room_imported(module)
            if other and other != room and FLOOR_OF[other] >= FLOOR_OF[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_file_circles() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources()}
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        if path in EXEMPT:
            continue
        targets = set()
        for _, module in imports(path):
            target = module if module in modules else module.rpartition(".")[0]
            if target in modules and target != name:
                targets.add(target)
        arrows[name] = targets
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "circle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(arrows.get(name, ())):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("hydra", ["framework/main.py"]),
        ("omegaconf", ["framework/main.py"]),
        ("ray", ["framework/cluster/"]),
        ("torch.cuda", ["framework/core/runtime.py"]),
    ],
)
def test_foreign_worlds_stay_at_their_edge(package: str, allowed: list[str]) -> None:
    wrong = []
    for path in sources():
        name = str(path.relative_to(ROOT))
        if any(name.startswith(edge) for edge in allowed):
            continue
        wrong += [f"{name}:{line}" for line, module in imports(path) if (module + ".").startswith(package + ".")]
        if package == "torch.cuda":
            wrong += [f"{name}" for _ in re.finditer(r"\btorch\.cuda\b", path.read_text())]
    assert not wrong


def test_the_model_knows_no_distribution_and_the_layout_knows_no_model() -> None:
    for path in sources():
        modules = [module for _, module in imports(path)]
        if room_of(path) == "models":
            assert not [m for m in modules if m.startswith("torch.distributed")], path


def test_configs_and_package_fronts_are_free_of_torch() -> None:
    """Importing every config.py and every package front must not pull torch in: help and refusals are instant."""
    fronts = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in sources()
        if p.name in ("__init__.py", "config.py")
    ]
    code = f"import sys, importlib\nfor m in {fronts!r}: importlib.import_module(m)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_files_and_functions_can_be_read_in_a_sitting() -> None:
    long_files = [f"{p.relative_to(ROOT)}: {n}" for p in sources() if (n := len(p.read_text().splitlines())) > 400]
    long_functions, sizes = [], []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                sizes.append(size)
                if size > 70:
                    long_functions.append(f"{path.relative_to(ROOT)}:{node.name}: {size}")
    assert not long_files
    assert not long_functions
    assert sorted(sizes)[len(sizes) // 2] <= 12


def test_every_file_opens_by_saying_what_it_is() -> None:
    silent = [str(p.relative_to(ROOT)) for p in sources() if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent


def test_no_vague_names() -> None:
    assert not [str(p) for p in sources() if p.stem in FORBIDDEN_NAMES or p.parent.name in FORBIDDEN_NAMES]


def test_public_names_have_docstrings_and_return_types() -> None:
    bare = []
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}:{node.name}: no docstring")
            if public and isinstance(node, ast.FunctionDef) and node.returns is None:
                bare.append(f"{path.relative_to(ROOT)}:{node.name}: no return type")
    assert not bare, "\n".join(bare)


def test_recipes_hold_no_class_paths() -> None:
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path


def test_the_top_level_holds_what_the_tree_shows() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert {name.split("/")[0] for name in tracked} <= TOP_LEVEL
