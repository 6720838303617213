"""Each format's records by hand; recognition from the first record; every wrong record answered with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

import framework
from framework.core.errors import DataError, UsageError
from framework.core.records import (
    ClassifiedSample,
    ConversationSample,
    LabelledSample,
    Message,
    PreferenceSample,
    PromptSample,
    Sample,
    TextSample,
)
from framework.core.registry import register
from framework.data.sources import open_sources, read, read_located, recognise
from tests.data.conftest import Write

U, A, S = (lambda text: Message("user", text)), (lambda text: Message("assistant", text)), "system"
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOOLS = Message("tools", '[{"type": "function", "function": {"name": "f", "parameters": {}}}]')
CALL = Message("assistant", "", '[{"name": "f", "arguments": {"x": 1}}]')
GOOD: list[tuple[str, dict[str, Any], Sample]] = [
    ("text", {"text": "春", "meta": 1}, TextSample("春")),
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, ConversationSample((U("i"), A("o")))),
    ("alpaca", {"instruction": "i", "input": "n", "output": "o"}, ConversationSample((U("i\nn"), A("o")))),
    (
        "alpaca",
        {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]], "input": None},
        ConversationSample((Message(S, "s"), U("q"), A("a"), U("i"), A("o"))),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        ConversationSample((Message(S, "s"), U("q"), A("a"))),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "observation", "value": "x"}, {"from": "assistant", "value": "a"}]},
        ConversationSample((Message("tool", "x"), A("a"))),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "f", "parameters": {}}]',
            "system_prompt": "s",
        },
        ConversationSample((TOOLS, Message(S, "s"), U("q"), CALL, Message("tool", "2"), A("a"))),
    ),
    ("messages", {"messages": TURNS, "id": 3}, ConversationSample((U("q"), A("a")))),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
        ConversationSample((TOOLS, U("q?"), CALL)),
    ),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, PreferenceSample((U("p"),), "c", "r")),
    (
        "preference",
        {
            "prompt": [TURNS[0]],
            "chosen": [TURNS[1]],
            "rejected": [*TURNS[:1], {**TURNS[1], "content": "b"}],
            "margin": 2,
        },
        PreferenceSample((U("q"),), "a", "b", 2.0),
    ),
    (
        "preference",
        {"chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "b"}]},
        PreferenceSample((U("q"),), "a", "b"),
    ),
    ("preference", {"prompt": "p", "chosen": TURNS[1], "rejected": [TURNS[1]]}, PreferenceSample((U("p"),), "a", "a")),
    (
        "hh",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: more?\n\nAssistant: good\n\nbetter",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: more?\n\nAssistant: bad",
        },
        PreferenceSample((U("q"), A("a"), U("more?")), "good\n\nbetter", "bad"),
    ),
    (
        "medicalgpt",
        {
            "system": "s",
            "history": [["h", "k"]],
            "question": "q",
            "response_chosen": "c",
            "response_rejected": "r",
        },
        PreferenceSample((Message(S, "s"), U("h"), A("k"), U("q")), "c", "r"),
    ),
    (
        "labelled",
        {"prompt": [TURNS[0]], "completion": [TURNS[1]], "label": False},
        LabelledSample((U("q"),), "a", False),
    ),
    ("labelled", {"prompt": "q", "completion": "a", "label": True}, LabelledSample((U("q"),), "a", True)),
    (
        "verl",
        {
            "data_source": "gsm8k",
            "prompt": [TURNS[0]],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "72"},
            "extra_info": {"split": "train", "index": 0},
        },
        PromptSample((U("q"),), "72"),
    ),
    ("verl", {"prompt": [TURNS[0]], "reward_model": {"ground_truth": [1, "二"]}}, PromptSample((U("q"),), '[1, "二"]')),
    ("classified", {"text": "春", "label": "poem"}, ClassifiedSample("春", None, "poem")),
    ("classified", {"text": "a", "text_pair": "b", "label": 1}, ClassifiedSample("a", "b", 1)),
    ("classified", {"sentence": "a", "label": 0, "idx": 3}, ClassifiedSample("a", None, 0)),
    ("classified", {"sentence1": "a", "sentence2": "b", "label": 3.8}, ClassifiedSample("a", "b", 3.8)),
    ("classified", {"question": "a", "sentence": "b", "label": 1}, ClassifiedSample("a", "b", 1)),
    ("classified", {"question1": "a", "question2": "b", "label": 1}, ClassifiedSample("a", "b", 1)),
    ("classified", {"premise": "a", "hypothesis": "b", "label": "x"}, ClassifiedSample("a", "b", "x")),
    ("classified", {"question": "a", "passage": "b", "label": True}, ClassifiedSample("a", "b", "true")),
    ("prompt", {"prompt": "p"}, PromptSample((U("p"),))),
    ("prompt", {"prompt": [TURNS[0]], "answer": "42"}, PromptSample((U("q"),), "42")),
]


@pytest.mark.parametrize(("name", "record", "sample"), GOOD)
def test_records_become_samples_and_are_recognised(write: Write, name: str, record: Any, sample: Sample) -> None:
    path = write("a.jsonl", [record, record])
    assert recognise(path) == name
    assert list(read(path)) == list(read(path, name)) == [sample, sample]


def test_texts_are_recognised_by_their_blank_lines(write: Write) -> None:
    poems, prose = write("poems.txt", ["a", "b"]), write("prose.txt", ["a", "b", "", "c"])
    assert (recognise(poems), recognise(prose)) == ("lines", "text")
    assert list(read(poems)) == [TextSample("a"), TextSample("b")]
    assert list(read(poems, "text")) == [TextSample("a\nb")]
    assert list(read(prose)) == [TextSample("a\nb"), TextSample("c")]
    assert list(read(prose, "lines")) == [TextSample("a"), TextSample("b"), TextSample("c")]


def test_folders_and_several_paths_keep_their_places(write: Write, tmp_path: Path) -> None:
    first, second = write("a.jsonl", [{"text": "1"}]), write("b.txt", ["2", "3"])
    places = [(p.sample, p.file, p.path, p.line) for p in read_located(open_sources([str(tmp_path), second]))]
    assert places == [
        (TextSample("1"), 0, first, 1),
        (TextSample("2"), 1, second, 1),
        (TextSample("3"), 1, second, 2),
        (TextSample("2"), 2, second, 1),
        (TextSample("3"), 2, second, 2),
    ]
    assert list(framework.data.read(str(tmp_path))) == [TextSample("1"), TextSample("2"), TextSample("3")]


WRONG: list[tuple[str, Any, str]] = [
    (
        "auto",
        {"body": "x"},
        "a.jsonl:2: no known format has the fields body (known: medicalgpt: question, response_chosen,",
    ),
    ("text", {"txt": "x"}, "a.jsonl:2: needs the field 'text'; the record has txt"),
    ("text", {"text": None}, "a.jsonl:2: needs the field 'text'; the record has (none)"),
    ("text", {"text": 3}, "a.jsonl:2: field 'text' must be a string, got int '3'"),
    ("text", '{"text": "\\ud800x"}', "a.jsonl:2: field 'text' holds half a character: '\\ud800' has no partner"),
    ("alpaca", {"instruction": "i"}, "a.jsonl:2: needs the field 'output'; the record has instruction"),
    ("alpaca", {"instruction": "i", "output": "o", "input": ["x"]}, "a.jsonl:2: field 'input' must be a string"),
    ("alpaca", {"instruction": "i", "output": "o", "history": ["x"]}, "a.jsonl:2: field 'history' must hold pairs"),
    ("messages", {"messages": []}, "a.jsonl:2: field 'messages' is empty"),
    ("messages", {"messages": "x"}, "a.jsonl:2: field 'messages' must be a list, got str 'x'"),
    ("messages", {"messages": ["x"]}, "a.jsonl:2: messages[0] must be an object with 'role' and 'content', got 'x'"),
    (
        "messages",
        {"messages": [{"role": "user"}]},
        "a.jsonl:2: messages[0]: needs the field 'content'; the record has role",
    ),
    (
        "messages",
        {"messages": [TURNS[0], {"role": "asistant", "content": ""}]},
        "a.jsonl:2: messages[1]: unknown role 'asistant': did you mean 'assistant'?",
    ),
    ("messages", {"messages": [{**TURNS[1], "weight": 0}]}, "a.jsonl:2: messages[0]: weight 0"),
    (
        "sharegpt",
        {"conversations": [{"from": "robot", "value": ""}]},
        "a.jsonl:2: conversations[0]: unknown from 'robot'",
    ),
    (
        "preference",
        {"prompt": "p", "chosen": "c"},
        "a.jsonl:2: needs the field 'rejected'; the record has chosen, prompt",
    ),
    (
        "preference",
        {"chosen": "c", "rejected": "r"},
        "a.jsonl:2: needs the field 'prompt', or 'chosen' and 'rejected' as",
    ),
    (
        "preference",
        {"prompt": "p", "chosen": TURNS, "rejected": "r"},
        "a.jsonl:2: field 'chosen' must be one assistant's turn behind the prompt, got user, assistant",
    ),
    (
        "preference",
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "big"},
        "a.jsonl:2: field 'margin' must be a number, got str 'big'",
    ),
    ("hh", {"chosen": "hello", "rejected": "x"}, "a.jsonl:2: field 'chosen' must begin with"),
    ("labelled", {"prompt": "p", "completion": "c", "label": 1}, "a.jsonl:2: field 'label' must be true or false, got"),
    ("verl", {"prompt": "p", "reward_model": "42"}, "a.jsonl:2: field 'reward_model' must be an object with"),
    ("medicalgpt", {"question": "q", "response_chosen": "c"}, "a.jsonl:2: needs the field 'response_rejected'"),
    ("sharegpt", {"conversations": TURNS, "tools": "[f"}, "a.jsonl:2: field 'tools' is not JSON: '[f'"),
    ("sharegpt", {"conversations": TURNS, "tools": {"f": 1}}, "a.jsonl:2: field 'tools' must be a list of functions"),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "f(1)"}]},
        "a.jsonl:2: conversations[0]: a tool call is not JSON: 'f(1)'",
    ),
    (
        "messages",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]},
        "a.jsonl:2: messages[0]: a tool call must be an object with 'name' and 'arguments'",
    ),
    (
        "messages",
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "a.jsonl:2: messages[0]: the arguments of a tool call must be an object, got '[1]'",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "a.jsonl:2: messages[0]: 'content' has a part of type 'image_url'; only text can be read",
    ),
    ("prompt", {"prompt": TURNS}, "a.jsonl:2: field 'prompt' ends with an assistant's turn"),
]


@pytest.mark.parametrize(("name", "record", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_records_are_answered_with_file_and_line(
    write: Write, tmp_path: Path, name: str, record: Any, message: str
) -> None:
    path = write("a.jsonl", ["", record])
    with pytest.raises(DataError) as caught:
        list(read(path, name))
    assert str(caught.value).startswith(str(tmp_path / message))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("format", ["auto", "text"])
def test_an_empty_file_is_an_error(write: Write, name: str, format: str) -> None:
    with pytest.raises(DataError, match="the file holds no record"):
        list(read(write(name, [""]), format))


def test_unknown_formats_are_answered_with_the_nearest(write: Write) -> None:
    path = write("a.jsonl", [{"text": "x"}])
    with pytest.raises(UsageError, match="unknown data_format 'alpca': did you mean 'alpaca'"):
        list(read(path, "alpca"))
    with pytest.raises(DataError, match=r"a \.txt file holds plain text; format alpaca needs"):
        list(read(write("a.txt", ["x"]), "alpaca"))


def test_an_extension_adds_a_format(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    @register("data_format", "haiku")
    def haiku(record: dict[str, Any]) -> TextSample:
        return TextSample("\n".join(record["lines"]))

    path = write("a.jsonl", [{"lines": ["a", "b"]}])
    assert list(read(path, "haiku")) == [TextSample("a\nb")]


def test_the_first_record_decides_and_later_ones_must_agree(write: Write) -> None:
    path = write("a.jsonl", [{"text": "x"}, {"prompt": "p"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: needs the field 'text'; the record has prompt"):
        list(read(path))


def test_a_json_array_reads_as_json_lines_do(write: Write, tmp_path: Path) -> None:
    records = [record for name, record, _ in GOOD if name == "preference"]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert list(read(str(tmp_path / "a.json"))) == list(read(write("a.jsonl", records)))
