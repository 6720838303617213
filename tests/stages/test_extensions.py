"""Extensions as files, modules and installed packages: imported once, again when changed, forgotten when not named."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.core.errors import UsageError
from framework.core.registry import forget, lookup, names, register
from framework.stages.extensions import absolute, load_extensions, load_same

REWARD = (
    "from framework import register\n\n@register('reward', '{name}')\ndef reward(completion):\n    return {value}\n"
)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    load_extensions([])


def write(path: Path, name: str, value: float) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(REWARD.format(name=name, value=value))
    return str(path)


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", "mine", 1)
    assert load_extensions([file]) == {"mine.py": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    first = lookup("reward", "mine")
    load_extensions([file])
    assert lookup("reward", "mine") is first, "nothing is imported twice"
    write(tmp_path / "mine.py", "mine", 2)  # same size, same second: cached bytecode would not notice
    load_extensions([file])
    assert lookup("reward", "mine")(None) == 2
    assert not (tmp_path / "__pycache__").exists()


def test_what_a_run_does_not_name_is_forgotten(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", "mine", 1)
    load_extensions([file])
    load_extensions([write(tmp_path / "other.py", "other", 1)])
    assert "mine" not in names("reward")
    assert "other" in names("reward")
    moved = write(tmp_path / "b/mine.py", "mine", 3)
    load_extensions([moved])
    assert lookup("reward", "mine")(None) == 3
    assert "other" not in names("reward")


def test_a_module_and_a_package_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "mine_module.py", "of_module", 1)
    write(tmp_path / "mine_package/rules.py", "of_package", 1)
    (tmp_path / "mine_package/__init__.py").write_text("from mine_package import rules\n")
    before = load_extensions(["mine_module", "mine_package"])
    assert lookup("reward", "of_module")(None) == lookup("reward", "of_package")(None) == 1
    assert before["mine_module"] == hashlib.sha256((tmp_path / "mine_module.py").read_bytes()).hexdigest()
    write(tmp_path / "mine_package/rules.py", "renamed", 22)
    after = load_extensions(["mine_module", "mine_package"])
    assert after["mine_module"] == before["mine_module"]
    assert after["mine_package"] != before["mine_package"], "every file of a package counts"
    assert lookup("reward", "renamed")(None) == 22
    assert "of_package" not in names("reward")


def test_an_installed_package_needs_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installer leaves behind: a module, and a .dist-info folder that offers it."""
    write(tmp_path / "installed_rules.py", "installed", 5)
    info = tmp_path / "installed_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[framework.extensions]\nrules = installed_rules\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_extensions([]) == {
        "installed_rules": hashlib.sha256((tmp_path / "installed_rules.py").read_bytes()).hexdigest()
    }
    assert lookup("reward", "installed")(None) == 5
    forget("installed_rules")


def test_a_worker_refuses_other_code_than_the_controllers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.py", "mine", 1)
    expected = load_extensions(["mine.py"])
    everywhere = absolute(["mine.py", "a.module"])
    assert everywhere == [str(tmp_path / "mine.py"), "a.module"]
    load_same(everywhere[:1], expected)
    write(tmp_path / "mine.py", "mine", 2)
    with pytest.raises(UsageError, match=r"extension mine\.py is [0-9a-f]{16} for the controller and [0-9a-f]{16} for"):
        load_same(everywhere[:1], expected)


REGISTERS = "from framework import register\nregister('rewards', 'x')"
BAD = [
    ("absent.py", None, "no such file: absent.py"),
    ("no_such_module", None, "there is no module 'no_such_module'; a file's name ends in .py"),
    ("no_such.module", None, "cannot import no_such.module: ModuleNotFoundError: No module named 'no_such'"),
    ("bad.py", "x = 1\nx.y\n", "cannot import bad: bad.py:2: AttributeError: 'int' object has no attribute 'y'"),
    ("bad.py", "def f(:\n", "cannot import bad: SyntaxError: invalid syntax (bad.py, line 1)"),
    ("bad.py", "import torch\ntorch.ones(2) @ torch.ones(3)\n", "cannot import bad: bad.py:2: RuntimeError"),
    ("bad.py", "raise ValueError('two\\nlines')\n", "cannot import bad: bad.py:1: ValueError: two lines"),
    ("bad.py", REGISTERS, "unknown kind 'rewards': did you mean 'reward'"),
]


@pytest.mark.parametrize(("name", "content", "line"), BAD, ids=[line for *_, line in BAD])
def test_what_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as refused:
        load_extensions([name])
    assert str(refused.value).removeprefix("extensions: ").startswith(line)
    assert len(str(refused.value).splitlines()) == 1
    assert f"framework_extension_{Path(name).stem}" not in sys.modules


def test_two_files_of_one_name_and_two_entries_of_one_name(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a/mine.py", "mine", 1), write(tmp_path / "b/mine.py", "mine", 2)
    with pytest.raises(UsageError, match=r"a/mine\.py and .*b/mine\.py have the same file name; rename one"):
        load_extensions([one, two])
    with pytest.raises(UsageError, match="reward 'mine' is registered twice: by framework_extension_mine"):
        load_extensions([one, write(tmp_path / "other.py", "mine", 3)])


def test_a_half_imported_file_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(REWARD.format(name="mine", value=1) + "raise RuntimeError('halfway')\n")
    with pytest.raises(UsageError, match="halfway"):
        load_extensions([str(file)])
    assert "mine" not in names("reward")
    register("reward", "mine")(lambda completion: 0.0)
    forget(__name__)
