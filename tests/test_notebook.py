"""`framework.run` as a notebook calls it: cells in one process under a running event loop, failures as exceptions."""

import ast
import asyncio
import inspect
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from framework.core.errors import Interrupted, UsageError
from tests.test_modify_ppo import BLOCKS, PAGE
from tests.tiny import PPO, model_folders

_PAGE_CELL = re.findall(r"```python\n(import framework\n.*?)```", PAGE, re.DOTALL)[0]
# What a notebook's interrupt button sends, once, while the reward is asked.
_INTERRUPTING = "import signal\n\nasked = []\n\n" + BLOCKS["short"].replace(
    "    return", "    asked or asked.append(signal.raise_signal(signal.SIGINT))\n    return"
)


class Notebook:
    """Runs cells as IPython does: one namespace, top-level await, inside a loop that is already running."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"TINY": PPO}

    async def run(self, cell: str) -> Any:
        """Execute a cell; returns the value of its last line, or raises what the cell raises."""
        *body, last = ast.parse(cell).body
        assert asyncio.get_running_loop().is_running()
        await self._execute(ast.Module(body, []), "exec")
        if isinstance(last, ast.Expr):
            return await self._execute(ast.Expression(last.value), "eval")
        return await self._execute(ast.Module([last], []), "exec")

    async def _execute(self, tree: ast.Module | ast.Expression, mode: str) -> Any:
        value = eval(compile(tree, "cell", mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), self.namespace)
        return await value if inspect.isawaitable(value) else value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    policy, _ = model_folders(tmp_path / "drawn")
    (tmp_path / "runs/sft").mkdir(parents=True)
    (tmp_path / "runs/sft/model").symlink_to(policy)
    (tmp_path / "short.py").write_text(BLOCKS["short"])
    return tmp_path


def test_a_session(here: Path) -> None:
    asyncio.run(session(Notebook(), here))


async def session(notebook: Notebook, here: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    figure, folder = await notebook.run(_small(_PAGE_CELL))
    assert (here / folder / "summary.json").exists()
    assert figure == pytest.approx(-0.2, abs=0.1)

    with pytest.raises(UsageError, match=r"unknown key 'ppo\.rewart': did you mean 'ppo\.reward'"):
        await notebook.run('framework.run("ppo", ["ppo.rewart=short"])')
    with pytest.raises(UsageError, match="no such folder: nowhere"):
        await notebook.run('framework.run("ppo", ["init_from=nowhere", *TINY, "ppo.reward=tone_pattern", "name=b"])')

    assert await notebook.run(_small(_PAGE_CELL)) == (figure, folder), "finished: only looked at"
    longer = 'framework.run("ppo", ["ppo.iterations=4", "extensions=[short.py]", "ppo.reward=short", *WORDS])'
    notebook.namespace["WORDS"] = ["init_from=runs/sft/model", *(word for word in PPO if "iterations" not in word)]
    assert (await notebook.run(longer)).summary["attempts"] == 2, "a longer run goes on"

    (here / "short.py").write_text(BLOCKS["short"].replace("/ 10", "/ 20"))
    with pytest.raises(UsageError, match=r"extension_digests\.short\.py: \w{16} there, \w{16} now"):
        await notebook.run(longer)
    halved, _ = await notebook.run(_small(_PAGE_CELL, "name=edited"))
    assert halved == pytest.approx(figure / 2), "the edited file is what runs"

    (here / "short.py").write_text(_INTERRUPTING)
    with pytest.raises(Interrupted, match="the same command continues from here"):
        await notebook.run(_small(_PAGE_CELL, "name=interrupted", "ppo.iterations=50"))
    assert await notebook.run("import asyncio\nawait asyncio.sleep(0, 'alive')") == "alive"
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def _small(cell: str, *words: str) -> str:
    """The page's cell, with words that make it small."""
    assert '"ppo.reward=short"]' in cell
    return cell.replace('"ppo.reward=short"]', f'"ppo.reward=short", *TINY, *{words}]')
