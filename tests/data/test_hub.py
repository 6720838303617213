"""Datasets of the hub, by the real library; a local folder laid out as a hub repository stands in for the network."""

import json
from pathlib import Path

import pytest

from framework.core.errors import DataError
from framework.core.records import ConversationSample, Message
from framework.data import hub
from framework.data.sources import open_sources, read

datasets = pytest.importorskip("datasets")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two splits of one subset; the library's cache is ours, and it stays offline."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner/name"
    (folder / "zh").mkdir(parents=True)
    for split in ("train", "test"):
        record = {"instruction": split, "input": None, "output": "o"}
        (folder / f"zh/{split}.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_a_split_comes_as_parquet_and_is_read(repository: Path) -> None:
    file = hub.fetch_parts(str(repository), None, "test", "zh")
    assert file.endswith(".parquet")
    assert list(read(file)) == [ConversationSample((Message("user", "test"), Message("assistant", "o")))]
    assert hub.fetch_parts(str(repository), None, "test", "zh") == file


def test_an_entry_of_dataset_info_may_name_the_hub(repository: Path, tmp_path: Path) -> None:
    words = {"hf_hub_url": str(repository), "folder": "zh", "columns": {"prompt": "instruction", "response": "output"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": words}))
    assert [sample.messages[0].content for sample in read(str(tmp_path / "mine"))] == ["train"]  # type: ignore[union-attr]


def test_wrong_names_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub:name: a dataset of the hub is written hub:OWNER/NAME"):
        open_sources(["hub:name"])
    with pytest.raises(DataError, match=r"hub:no/such: cannot be had from the hub: ") as caught:
        open_sources(["hub:no/such"])
    assert "\n" not in str(caught.value)
