"""The recipe's own code: files, modules and installed packages that enter names into the registry when imported.

Code is known by its content: one that changed since this process imported it is imported anew, and a file that this
run does not name is forgotten, so that a notebook's second run is what a fresh command would be. Left out: looking the
names up (`core.registry`).
"""

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType

from framework.core.errors import FrameworkError, UsageError
from framework.core.registry import forget

GROUP = "framework.extensions"  # the entry point group of installed packages
_FILE = "framework_extension_"  # + the file's stem: the module that a file becomes
_imported: dict[str, str] = {}  # module -> sha256 of the code when it was imported


def load_extensions(names: Sequence[str]) -> dict[str, str]:
    """Import files (`my_ppo.py`), modules (`my_package.ppo`), and whatever installed packages offer in GROUP.

    Returns the sha256 of each: of a file as sha256sum gives it, of a package over all its Python files. UsageError for
    one that is missing or fails, with the line at fault.
    """
    files = _files(name for name in names if name.endswith(".py"))
    for module in [module for module in _imported if module.startswith(_FILE) and module not in files]:
        _drop(module)
    digests = {path.name: _bring(module, path, partial(_run, module, path)) for module, path in files.items()}
    installed = [entry.module for entry in metadata.entry_points(group=GROUP)]
    for module in [*(name for name in names if not name.endswith(".py")), *installed]:
        digests[module] = _bring(module, _origin(module), partial(importlib.import_module, module))
    return digests


def load_same(names: Sequence[str], expected: Mapping[str, str]) -> None:
    """As `load_extensions`, in a worker: refuses code other than the controller's."""
    found = load_extensions(names)
    for name in sorted(expected.keys() | found.keys()):
        there, here = expected.get(name, "absent"), found.get(name, "absent")
        if there != here:
            raise UsageError(f"extension {name} is {there[:16]} for the controller and {here[:16]} for this worker")


def absolute(names: Iterable[str]) -> list[str]:
    """The same extensions, wherever a worker's working folder is."""
    return [str(Path(name).absolute()) if name.endswith(".py") else name for name in names]


def _files(names: Iterable[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in map(Path, names):
        if not path.is_file():
            raise UsageError(f"extensions: no such file: {path}")
        other = found.setdefault(_FILE + path.stem, path)
        if other.absolute() != path.absolute():
            raise UsageError(f"extensions: {other} and {path} have the same file name; rename one")
    return found


def _origin(module: str) -> Path:
    """Where a module's code stands: its file, or its package's folder."""
    with _reported(module, None):
        spec = importlib.util.find_spec(module)
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        raise UsageError(f"extensions: there is no module '{module}'; a file's name ends in .py")
    folders = list(spec.submodule_search_locations or ())
    return Path(folders[0] if folders else str(spec.origin))


def _bring(module: str, path: Path, load: Callable[[], object]) -> str:
    """Import what is new or has changed; returns the sha256 of its code."""
    digest = _digest(path)
    if _imported.get(module) != digest:
        if module in _imported:
            _drop(module)
        with _reported(module, path):
            load()
        _imported[module] = digest
    return digest


def _drop(module: str) -> None:
    """Make it as if it had never been imported here."""
    _imported.pop(module, None)
    forget(module)
    for name in [name for name in sys.modules if name == module or name.startswith(module + ".")]:
        del sys.modules[name]


def _run(module: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    made = sys.modules[module] = importlib.util.module_from_spec(spec)
    # Not the loader's exec: its cached bytecode is good for a second, longer than an edit takes.
    exec(compile(path.read_bytes(), path, "exec"), vars(made))
    return made


def _digest(path: Path) -> str:
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    total = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        total.update(f"{file.relative_to(path)}:{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def _reported(module: str, path: Path | None) -> Iterator[None]:
    """A failure of the user's code becomes one line that names the line at fault; nothing of it stays behind."""
    try:
        yield
    except FrameworkError:
        _drop(module)
        raise
    except (Exception, SystemExit) as error:
        _drop(module)
        place = _place(error, path) if path else ""
        name = module.removeprefix(_FILE)
        said = " ".join(str(error).split())
        raise UsageError(f"extensions: cannot import {name}: {place}{type(error).__name__}: {said}") from None


def _place(error: BaseException, path: Path) -> str:
    """ "my_ppo.py:3: ", the last line of the user's code that the error passed; a syntax error says it itself."""
    if isinstance(error, SyntaxError):
        return ""
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(path))]
    return f"{inside[-1].filename}:{inside[-1].lineno}: " if inside else ""
