"""A table into a file is whole, whatever colours and terminals the environment speaks of."""

import pytest
from rich.table import Table

from framework.tracking.console import console


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1", "TERM": "dumb"}, {"COLUMNS": "150"}], ids=str)
def test_nothing_is_cut(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    table = Table("a" * 70, "b" * 70)
    console().print(table)
    assert "a" * 70 in capsys.readouterr().out
