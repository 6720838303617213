"""From records to samples: the field's formats, recognised from a file's first record, or forced by name.

| format     | record                                                                                       |
|------------|----------------------------------------------------------------------------------------------|
| text       | {"text": ...}; of a .txt the blocks between blank lines (the whole file where there are none) |
| lines      | as text, but every line of a .txt is a document: recognised where no blank line separates any |
| alpaca     | {"instruction", "output", "input"?, "system"?, "history"?: [[question, answer], ...]}         |
| sharegpt   | {"conversations": [{"from": "human" or "gpt", "value"}], "system"?}                           |
| messages   | {"messages": [{"role", "content"}]} (OpenAI)                                                  |
| preference | {"prompt"?, "chosen", "rejected", "margin"?}: strings, or lists of messages (TRL)             |
| prompt     | {"prompt": string or messages, "answer"?}                                                     |

An extension registers another with `@register("data_format", name)`: a function from a record to a sample, raising
DataError for a record that it cannot take; the reader adds file and line. A null field counts as absent.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.core.errors import DataError, nearest
from framework.core.records import ConversationSample, Message, PreferenceSample, PromptSample, Sample, TextSample
from framework.core.registry import lookup, register
from framework.data import files
from framework.data.files import Raw, Record

Format = Callable[[Record], Sample]

# A record with all these fields is of that format; the first that fits decides.
_MARKS = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "prompt": ("prompt",),
}
_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


@dataclass(frozen=True)
class Located:
    """A sample and where it stands: file number `file` of those read, its path, line, and bytes read with it."""

    sample: Sample
    file: int
    path: str
    line: int
    offset: int


def read(path: str, format: str = "auto") -> Iterator[Sample]:
    """The samples of a file or folder, streaming. Errors are DataErrors that name file and line."""
    return (located.sample for located in read_located([path], format))


def read_located(paths: list[str], format: str = "auto") -> Iterator[Located]:
    """As `read`, over several files and folders, with places."""
    for number, path in enumerate(expand(paths)):
        name = recognise(path) if format == "auto" else format
        yield from _read_file(number, path, name)


def expand(paths: list[str]) -> list[str]:
    """The data files behind several paths, in order."""
    return [file for path in paths for file in files.expand(path)]


def recognise(path: str) -> str:
    """The format of a data file, from its first record."""
    if Path(path).suffix == ".txt":
        return "text" if files.has_paragraphs(path) else "lines"
    first = next(files.records(path), None)
    if first is None:
        raise DataError("the file holds no record", path)
    present = _present(first.record)
    for name, fields in _MARKS.items():
        if all(field in present for field in fields):
            return name
    wanted = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in _MARKS.items())
    raise DataError(f"no known format has the fields {_listing(present)} (known: {wanted})", path, first.line)


def _read_file(number: int, path: str, name: str) -> Iterator[Located]:
    parse: Format = lookup("data_format", name)
    if Path(path).suffix == ".txt" and name not in ("text", "lines"):
        raise DataError(f"a .txt file holds plain text; format {name} needs .jsonl, .json or .parquet", path)
    raw = None
    for raw in files.records(path, paragraphs=name != "lines"):
        yield Located(_parsed(parse, raw, path), number, path, raw.line, raw.offset)
    if raw is None:
        raise DataError("the file holds no record", path)


def _parsed(parse: Format, raw: Raw, path: str) -> Sample:
    try:
        return parse(_present(raw.record))
    except DataError as error:
        raise DataError(str(error), path, raw.line) from None


@register("data_format", "text")
def text(record: Record) -> TextSample:
    """{"text": "..."}"""
    return TextSample(_string(record, "text"))


@register("data_format", "lines")
def lines(record: Record) -> TextSample:
    """As text; the reader gives it a .txt line by line."""
    return text(record)


@register("data_format", "alpaca")
def alpaca(record: Record) -> ConversationSample:
    """Instruction and input become one user turn, on two lines."""
    asked = [_string(record, "instruction"), _string(record, "input", "")]
    system = [Message("system", record["system"])] if _string(record, "system", "") else []
    earlier = [turn for pair in _list(record, "history", []) for turn in _exchange(pair)]
    last = [Message("user", "\n".join(filter(None, asked))), Message("assistant", _string(record, "output"))]
    return ConversationSample((*system, *earlier, *last))


@register("data_format", "sharegpt")
def sharegpt(record: Record) -> ConversationSample:
    """Turns with "from" and "value"."""
    system = [Message("system", record["system"])] if _string(record, "system", "") else []
    turns = _messages(record, "conversations", "from", "value")
    return ConversationSample((*system, *turns))


@register("data_format", "messages")
def messages(record: Record) -> ConversationSample:
    """OpenAI's chat format."""
    return ConversationSample(_messages(record, "messages"))


@register("data_format", "preference")
def preference(record: Record) -> PreferenceSample:
    """Two answers to one prompt. Answers given as messages may repeat the prompt; without "prompt" they must."""
    chosen, rejected = _answer(record, "chosen"), _answer(record, "rejected")
    if "prompt" in record:
        prompt = _prompt(record)
    else:
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1]))
        prompt = tuple(first for first, _ in shared)
        if not prompt:
            raise DataError("needs the field 'prompt', or 'chosen' and 'rejected' as messages that begin with it")
    return PreferenceSample(
        prompt, _behind(prompt, chosen, "chosen"), _behind(prompt, rejected, "rejected"), _number(record, "margin")
    )


@register("data_format", "prompt")
def prompt(record: Record) -> PromptSample:
    """What to answer, for reinforcement learning; "answer" is the reference where a task has one."""
    return PromptSample(_prompt(record), _string(record, "answer") if "answer" in record else None)


def _present(record: Record) -> Record:
    return {name: value for name, value in record.items() if value is not None}


def _listing(record: Record) -> str:
    return ", ".join(sorted(map(str, record))) or "(none)"


def _field(record: Record, name: str) -> Any:
    if name not in record:
        raise DataError(f"needs the field '{name}'; the record has {_listing(record)}")
    return record[name]


def _string(record: Record, name: str, default: str | None = None) -> str:
    value = record.get(name, default) if default is not None else _field(record, name)
    if not isinstance(value, str):
        raise DataError(f"field '{name}' must be a string, got {type(value).__name__} {str(value)[:40]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field '{name}' holds half a character: {value[error.start]!a} has no partner") from None
    return value


def _list(record: Record, name: str, default: list[Any] | None = None) -> list[Any]:
    value = record.get(name, default) if default is not None else _field(record, name)
    if not isinstance(value, list):
        raise DataError(f"field '{name}' must be a list, got {type(value).__name__} {str(value)[:40]!r}")
    return value


def _number(record: Record, name: str) -> float | None:
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise DataError(f"field '{name}' must be a number, got {type(value).__name__} {str(value)[:40]!r}")
    return None if value is None else float(value)


def _exchange(pair: Any) -> tuple[Message, Message]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
        raise DataError(f"field 'history' must hold pairs [question, answer], got {str(pair)[:40]!r}")
    return Message("user", pair[0]), Message("assistant", pair[1])


def _messages(record: Record, name: str, role_field: str = "role", text_field: str = "content") -> tuple[Message, ...]:
    turns = _list(record, name)
    if not turns:
        raise DataError(f"field '{name}' is empty")
    return tuple(_message(turn, f"{name}[{n}]", role_field, text_field) for n, turn in enumerate(turns))


def _message(turn: Any, place: str, role_field: str, text_field: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{place} must be an object with '{role_field}' and '{text_field}', got {str(turn)[:40]!r}")
    try:
        role = _string(_present(turn), role_field)
        content = _string(_present(turn), text_field)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    known = {**{role: role for role in _ROLES}, **(_SHAREGPT_ROLES if role_field == "from" else {})}
    if role not in known:
        raise DataError(f"{place}: unknown {role_field} '{role}': {nearest(role, known)}")
    if turn.get("weight") == 0:
        raise DataError(f"{place}: weight 0 (a turn that is not trained) is not supported; leave the turn's sample out")
    return Message(known[role], content)


def _prompt(record: Record) -> tuple[Message, ...]:
    if isinstance(_field(record, "prompt"), list):
        turns = _messages(record, "prompt")
        if turns[-1].role == "assistant":
            raise DataError("field 'prompt' ends with an assistant's turn; there is nothing left to answer")
        return turns
    return (Message("user", _string(record, "prompt")),)


def _answer(record: Record, name: str) -> tuple[Message, ...]:
    if isinstance(_field(record, name), list):
        return _messages(record, name)
    return (Message("assistant", _string(record, name)),)


def _behind(prompt: tuple[Message, ...], answer: tuple[Message, ...], name: str) -> str:
    """The answer's text, the prompt that it may repeat taken off."""
    rest = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
    if len(rest) != 1 or rest[0].role != "assistant":
        roles = ", ".join(message.role for message in rest) or "nothing"
        raise DataError(f"field '{name}' must be one assistant's turn behind the prompt, got {roles}")
    return rest[0].content
