"""Entries of a dataset_info.json as LLaMA-Factory writes them: files, columns, tags, ranking, labels, limits."""

import json
from pathlib import Path
from typing import Any

import pytest

from framework.core.errors import DataError
from framework.core.records import (
    ConversationSample,
    LabelledSample,
    Message,
    PreferenceSample,
    Sample,
    TextSample,
    Tokenizer,
)
from framework.data.config import DataConfig
from framework.data.sft import open_rows
from framework.data.sources import described, open_sources, read, read_located

U, A, S = (lambda text: Message("user", text)), (lambda text: Message("assistant", text)), "system"
MESSAGES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
ENTRIES: list[tuple[str, dict[str, Any], dict[str, Any], Sample]] = [
    (
        "alpaca as it is",
        {},
        {"instruction": "i", "input": "n", "output": "o"},
        ConversationSample((U("i\nn"), A("o"))),
    ),
    (
        "alpaca with other columns",
        {"columns": {"prompt": "q", "response": "a", "system": "s", "history": "h", "tools": "t"}},
        {"q": "i", "a": "o", "s": "be kind", "h": [["x", "y"]], "input": "not read", "t": ""},
        ConversationSample((Message(S, "be kind"), U("x"), A("y"), U("i"), A("o"))),
    ),
    ("texts to pretrain on", {"columns": {"prompt": "body"}}, {"body": "b"}, TextSample("b")),
    (
        "alpaca pairs",
        {"ranking": True, "columns": {"prompt": "i", "query": "n", "chosen": "c", "rejected": "r"}},
        {"i": "p", "n": "", "c": "good", "r": "bad"},
        PreferenceSample((U("p"),), "good", "bad"),
    ),
    (
        "alpaca labels",
        {"columns": {"prompt": "i", "response": "o", "kto_tag": "ok"}},
        {"i": "p", "o": "a", "ok": False},
        LabelledSample((U("p"),), "a", False),
    ),
    (
        "sharegpt with a system turn and a call",
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": "[]",
        },
        ConversationSample(
            (
                Message(S, "s"),
                U("q"),
                Message("assistant", "", '[{"name": "f", "arguments": {}}]'),
                Message("tool", "1"),
                A("a"),
            )
        ),
    ),
    (
        "sharegpt with tags",
        {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": MESSAGES},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ConversationSample((U("q"), A("a"))),
    ),
    (
        "openai",
        {"formatting": "openai", "columns": {"messages": "messages"}},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ConversationSample((U("q"), A("a"))),
    ),
    (
        "sharegpt pairs",
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        PreferenceSample((U("q"),), "good", "bad"),
    ),
    (
        "sharegpt labels",
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": MESSAGES,
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": True},
        LabelledSample((U("q"),), "a", True),
    ),
]


def describe(folder: Path, words: dict[str, Any], records: list[Any], name: str = "mine") -> str:
    """A folder with one described dataset; the path that names it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": "rows.jsonl", **words}}))
    return str(folder / name)


@pytest.mark.parametrize(("words", "record", "sample"), [e[1:] for e in ENTRIES], ids=[e[0] for e in ENTRIES])
def test_records_by_their_entry(tmp_path: Path, words: dict[str, Any], record: dict[str, Any], sample: Sample) -> None:
    path = describe(tmp_path, words, [record, record])
    assert list(read(path)) == [sample, sample]
    assert described(open_sources([path])) == "format mine of dataset_info.json"


def test_num_samples_limits_and_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    words = {"columns": {"prompt": "body"}}
    path = describe(tmp_path, {**words, "num_samples": 2}, [{"body": "1"}, {"body": "2"}, {"text": "3"}])
    assert list(read(path)) == [TextSample("1"), TextSample("2")]
    path = describe(tmp_path, words, [{"body": "1"}, {"body": 2}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: field 'body' must be a string, got int '2'"):
        list(read(path))


def test_a_dataset_may_be_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in "ab":
        (tmp_path / f"parts/{name}.jsonl").write_text(json.dumps({"instruction": name, "output": "o"}) + "\n")
    path = describe(tmp_path, {"file_name": "parts"}, [])
    places = [(Path(found.path).name, found.file) for found in read_located(open_sources([path]))]
    assert places == [("a.jsonl", 0), ("b.jsonl", 1)]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"formatting": "shargpt"}, "mine: formatting 'shargpt': did you mean 'sharegpt'?"),
    ({"ranking": True}, "ranking needs the column 'chosen' in dataset_info.json"),
    ({"file_name": "no.jsonl"}, "no.jsonl: no such file or folder"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[message for _, message in WRONG])
def test_entries_that_cannot_be_read(tmp_path: Path, words: dict[str, Any], message: str) -> None:
    path = describe(tmp_path, words, [{"instruction": "i", "output": "o"}])
    with pytest.raises(DataError) as caught:
        list(read(path))
    assert message in str(caught.value)


def test_names_are_answered_with_the_nearest_and_a_folder_with_its_datasets(tmp_path: Path) -> None:
    path = describe(tmp_path, {}, [{"instruction": "i", "output": "o"}], "alpaca_zh")
    with pytest.raises(DataError, match=r"dataset_info\.json: has no dataset 'alpaca': did you mean 'alpaca_zh'\?"):
        open_sources([path.removesuffix("_zh")])
    with pytest.raises(DataError, match=r"name one of its datasets, e\.g\. .*alpaca_zh"):
        open_sources([str(tmp_path)])
    (tmp_path / "dataset_info.json").write_text('{"a": {"script_url": "x.py"}, "b": {"ms_hub_url": "o/n"}, "c": 1}')
    with pytest.raises(DataError, match="must be an object that describes each dataset by an object"):
        open_sources([str(tmp_path / "a")])
    (tmp_path / "dataset_info.json").write_text('{"a": {"script_url": "x.py"}, "b": {"ms_hub_url": "o/n"}}')
    with pytest.raises(DataError, match=r"a: script_url is not read; give the data as file_name or hf_hub_url"):
        open_sources([str(tmp_path / "a")])
    with pytest.raises(DataError, match="b: names no file_name and no hf_hub_url; it has ms_hub_url"):
        open_sources([str(tmp_path / "b")])


def test_a_changed_entry_prepares_anew(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def rows(words: dict[str, Any]) -> str:
        path = describe(tmp_path, words, [{"q": "ab", "a": "cd", "b": "efgh"}])
        opened = open_rows(DataConfig(train=[path], max_tokens=32), "train", tokenizer, tmp_path / "cache", 0)
        return opened.preview()

    assert "«cd" in rows({"columns": {"prompt": "q", "response": "a"}})
    assert "«efgh" in rows({"columns": {"prompt": "q", "response": "b"}})
