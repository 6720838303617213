"""LLaMA-Factory's dataset_info.json: the datasets of a folder by name, with each one's columns and tags.

`data.train=[data/alpaca_zh]` reads the entry `alpaca_zh` of data/dataset_info.json. An entry's records are spelled anew
in our own formats, so that one parser serves both. Columns and tags mean what they mean there; where an entry names
"columns", those that it leaves out do not exist. Left out: pictures, sound and video; loading scripts, which are code
(law Files); `num_samples` takes the first ones, not random ones.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.core.errors import DataError, nearest
from framework.data.fields import field, items, listing, present, string
from framework.data.files import Record

FILE = "dataset_info.json"
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_KINDS: dict[str, type] = {
    **dict.fromkeys(("file_name", "hf_hub_url", "subset", "split", "folder", "formatting"), str),
    **{"columns": dict, "tags": dict, "num_samples": int},
}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_OPENAI_TAGS = {**_TAGS, "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_OPENAI_TAGS |= {"observation_tag": "tool"}
_SPEAKERS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url")
_NOT_READ = ("script_url", "cloud_file_name")


@dataclass(frozen=True)
class Entry:
    """One dataset. Example: Entry(folder=Path("data"), name="alpaca_zh", words={"file_name": "alpaca_zh.json"})."""

    folder: Path
    name: str
    words: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.folder / FILE}: {self.name}"

    @property
    def file(self) -> str | None:
        """The file or folder that it names, None where it names a hub."""
        name = self.words.get("file_name")
        return None if name is None else str(self.folder / name)

    @property
    def hub(self) -> tuple[str, str | None, str, str | None]:
        """(repository, subset, split, folder) on the Hugging Face hub."""
        if self.words.get("hf_hub_url") is None:
            raise DataError(f"names no file_name and no hf_hub_url; it has {listing(dict(self.words))}", self.place)
        words = self.words
        return words["hf_hub_url"], words.get("subset"), words.get("split", "train"), words.get("folder")

    @property
    def limit(self) -> int | None:
        """How many of its samples are read; None for all."""
        return self.words.get("num_samples")

    @property
    def adapt(self) -> "Adapt":
        """What spells a record of this dataset in one of our formats: -> (format, record)."""
        style = self.words.get("formatting", "alpaca")
        if style not in ("alpaca", "sharegpt", "openai"):
            raise DataError(f"formatting '{style}': {nearest(style, ['alpaca', 'sharegpt', 'openai'])}", self.place)
        columns = self.words.get("columns") or _COLUMNS
        tags = {**(_OPENAI_TAGS if style == "openai" else _TAGS), **self.words.get("tags", {})}
        ranking = bool(self.words.get("ranking", False))
        if style == "alpaca" and "prompt" not in columns:
            raise DataError(f"columns must name the prompt's; they name {listing(dict(columns))}", self.place)
        if style == "alpaca":
            return lambda record: _alpaca(present(record), columns, ranking)
        return lambda record: _conversation(present(record), {"messages": "conversations", **columns}, tags, ranking)


Adapt = Callable[[Record], tuple[str, Record]]


def find(path: str) -> Entry | None:
    """The dataset that `path` names: FOLDER/NAME where FOLDER holds a dataset_info.json and NAME is no file in it."""
    place = Path(path)
    file = place.parent / FILE
    if place.exists() or not file.is_file():
        return None
    known = _read(file)
    if place.name not in known:
        raise DataError(f"has no dataset '{place.name}': {nearest(place.name, known)}", str(file))
    words = known[place.name]
    for key, kind in _KINDS.items():
        if not isinstance(words.get(key), kind | None):
            wanted = {str: "a string", dict: "an object", int: "a whole number"}[kind]
            raise DataError(f"{key} must be {wanted}, got {words[key]!r}", f"{file}: {place.name}")
    for key in _NOT_READ:
        if key in words and not any(hub in words for hub in ("file_name", *_HUBS)):
            raise DataError(f"{key} is not read; give the data as file_name or hf_hub_url", f"{file}: {place.name}")
    return Entry(place.parent, place.name, words)


def names(folder: str) -> list[str]:
    """The datasets that a folder's dataset_info.json describes; none where it has no such file."""
    file = Path(folder) / FILE
    return sorted(_read(file)) if file.is_file() else []


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON: {error}", str(file)) from None
    if not isinstance(content, dict) or not all(isinstance(words, dict) for words in content.values()):
        raise DataError("must be an object that describes each dataset by an object", str(file))
    return content


def _alpaca(record: Record, columns: Mapping[str, str], ranking: bool) -> tuple[str, Record]:
    if "response" not in columns and not ranking:
        return "text", {"text": string(record, columns["prompt"])}
    asked = [string(record, columns["prompt"]), string(record, columns.get("query", ""), "")]
    question = "\n".join(filter(None, asked))
    around = _around(record, columns)
    earlier = _history(record, columns)
    prompt = [*earlier, {"role": "user", "content": question}]
    if ranking:
        return "preference", {**around, "prompt": prompt, **_ranked(record, columns, lambda answer: answer)}
    answer = string(record, columns["response"])
    if "kto_tag" in columns:
        label = field(record, columns["kto_tag"])
        return "labelled", {**around, "prompt": prompt, "completion": answer, "label": label}
    return "messages", {**around, "messages": [*prompt, {"role": "assistant", "content": answer}]}


def _history(record: Record, columns: Mapping[str, str]) -> list[Record]:
    pairs = items(record, columns["history"], []) if "history" in columns else []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"field '{columns['history']}' must hold pairs [question, answer], got {str(pairs)[:40]!r}")
    return [{"role": role, "content": said} for pair in pairs for role, said in zip(("user", "assistant"), pair)]


def _conversation(
    record: Record, columns: Mapping[str, str], tags: Mapping[str, str], ranking: bool
) -> tuple[str, Record]:
    turns = [_turn(turn, tags) for turn in items(record, columns["messages"])]
    around = _around(record, columns)
    if ranking:
        return "preference", {**around, "prompt": turns, **_ranked(record, columns, lambda turn: _turn(turn, tags))}
    if "kto_tag" in columns:
        label = field(record, columns["kto_tag"])
        return "labelled", {**around, "prompt": turns[:-1], "completion": turns[-1:], "label": label}
    return "messages", {**around, "messages": turns}


def _turn(turn: Any, tags: Mapping[str, str]) -> Any:
    """A turn as OpenAI spells it; what is no turn is left for the format to refuse."""
    if not isinstance(turn, dict) or tags["role_tag"] not in turn:
        return turn
    said, content = turn[tags["role_tag"]], turn.get(tags["content_tag"])
    if said == tags["function_tag"]:
        return {"role": "assistant", "content": "", "tool_calls": content}
    roles = {tags[name]: role for name, role in _SPEAKERS.items()}
    calls = {"tool_calls": turn["tool_calls"]} if turn.get("tool_calls") else {}
    return {"role": roles.get(said, said), "content": content, **calls}


def _ranked(record: Record, columns: Mapping[str, str], spell: Callable[[Any], Any]) -> Record:
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        raise DataError(f"ranking needs the column '{missing[0]}' in {FILE}")
    return {name: spell(field(record, columns[name])) for name in ("chosen", "rejected")}


def _around(record: Record, columns: Mapping[str, str]) -> Record:
    """System text and tools, where the entry names their columns."""
    there = {name: record.get(columns[name]) for name in ("system", "tools") if name in columns}
    return present(there)
