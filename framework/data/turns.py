"""Turns of a conversation, as the field's formats write them: objects, question–answer pairs, marked-up text, tools.

What an assistant may call stands in front as a turn of the role "tools"; what it called, in its own turn.
"""

import json
import re
from typing import Any

from framework.core.errors import DataError, nearest
from framework.core.records import Message
from framework.data.fields import field, items, present, string
from framework.data.files import Record

Turns = tuple[Message, ...]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "function_call"}
_SPOKEN = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF writes a whole dialogue as one string


def opening(record: Record) -> Turns:
    """The turns that fields beside the conversation stand for: `tools`, and `system` (MedicalGPT: `system_prompt`)."""
    tools = _tools(record["tools"]) if record.get("tools") else ""
    system = string(record, "system", "") or string(record, "system_prompt", "")
    turns = (Message("tools", tools), Message("system", system))
    return tuple(turn for turn in turns if turn.content not in ("", "[]"))


def history(record: Record) -> Turns:
    """Earlier turns as pairs: "history": [[question, answer], ...]."""
    return tuple(turn for pair in items(record, "history", []) for turn in _exchange(pair))


def messages(record: Record, name: str) -> Turns:
    """Turns as OpenAI writes them: {"role", "content"}, with "tool_calls" where the assistant calls."""
    return _turns(record, name, "role", "content")


def sharegpt(record: Record, name: str) -> Turns:
    """Turns as {"from", "value"}; a "function_call" holds JSON."""
    return _turns(record, name, "from", "value")


def dialogue(text: str, name: str) -> Turns:
    """HH-RLHF's "\\n\\nHuman: ...\\n\\nAssistant: ..." as turns."""
    before, *parts = _SPOKEN.split(text)
    if before.strip() or not parts:
        raise DataError(f"field '{name}' must begin with '\\n\\nHuman:', got {text[:40]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2]))


def is_dialogue(value: Any) -> bool:
    """Whether a field is written as HH-RLHF writes dialogues."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def prompt(record: Record) -> Turns:
    """The field 'prompt': a string, or turns that leave an answer open."""
    if not isinstance(field(record, "prompt"), list):
        return (Message("user", string(record, "prompt")),)
    turns = messages(record, "prompt")
    if turns[-1].role == "assistant":
        raise DataError("field 'prompt' ends with an assistant's turn; there is nothing left to answer")
    return turns


def answer(record: Record, name: str) -> Turns:
    """An answer: a string, one turn, or turns that may repeat the prompt."""
    value = field(record, name)
    if isinstance(value, dict):
        return messages({name: [value]}, name)
    return messages(record, name) if isinstance(value, list) else (Message("assistant", string(record, name)),)


def behind(asked: Turns, answered: Turns, name: str) -> str:
    """The answer's text, the prompt that it may repeat taken off."""
    rest = answered[len(asked) :] if answered[: len(asked)] == asked else answered
    if len(rest) != 1 or rest[0].role != "assistant":
        roles = ", ".join(message.role for message in rest) or "nothing"
        raise DataError(f"field '{name}' must be one assistant's turn behind the prompt, got {roles}")
    if rest[0].tool_calls:
        raise DataError(f"field '{name}' is a tool call; pairs are of answers in words")
    return rest[0].content


def _turns(record: Record, name: str, role_field: str, text_field: str) -> Turns:
    turns = items(record, name)
    if not turns:
        raise DataError(f"field '{name}' is empty")
    return tuple(_turn(turn, f"{name}[{n}]", role_field, text_field) for n, turn in enumerate(turns))


def _turn(turn: Any, place: str, role_field: str, text_field: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{place} must be an object with '{role_field}' and '{text_field}', got {str(turn)[:40]!r}")
    try:
        return _message(present(turn), role_field, text_field)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _message(turn: Record, role_field: str, text_field: str) -> Message:
    known = _ROLES | (_SHAREGPT_ROLES if role_field == "from" else {})
    said = string(turn, role_field)
    if said not in known:
        raise DataError(f"unknown {role_field} '{said}': {nearest(said, known)}")
    if turn.get("weight") == 0:
        raise DataError("weight 0 (a turn that is not trained) is not supported; leave the turn's sample out")
    if known[said] == "function_call":
        return Message("assistant", "", _calls(string(turn, text_field)))
    if turn.get("tool_calls"):
        return Message(known[said], _text({text_field: "", **turn}, text_field), _calls(turn["tool_calls"]))
    return Message(known[said], _text(turn, text_field))


def _text(turn: Record, name: str) -> str:
    """A turn's text; OpenAI may write it in parts, and only parts of text are text."""
    if not isinstance(turn.get(name), list):
        return string(turn, name)
    for part in turn[name]:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataError(f"'{name}' has a part of type {str(kind)[:40]!r}; only text can be read")
    return "".join(string(part, "text") for part in turn[name])


def _calls(value: Any) -> str:
    """Tool calls as JSON: [{"name", "arguments": {...}}, ...], from OpenAI's list, one such object, or its text."""
    decoded = _decoded(value, "a tool call")
    calls = decoded if isinstance(decoded, list) else [decoded]
    return json.dumps([_call(call) for call in calls], ensure_ascii=False)


def _call(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or "name" not in inner:
        raise DataError(f"a tool call must be an object with 'name' and 'arguments', got {str(call)[:40]!r}")
    arguments = _decoded(inner.get("arguments", {}), "the arguments of a tool call")
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments of a tool call must be an object, got {str(arguments)[:40]!r}")
    return {"name": string(inner, "name"), "arguments": arguments}


def _tools(value: Any) -> str:
    """Functions as chat templates know them, {"type": "function", "function": ...}; bare ones are wrapped."""
    decoded = _decoded(value, "field 'tools'")
    if not (isinstance(decoded, list) and all(isinstance(tool, dict) for tool in decoded)):
        raise DataError(f"field 'tools' must be a list of functions, got {str(decoded)[:40]!r}")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in decoded]
    return json.dumps(wrapped, ensure_ascii=False)


def _decoded(value: Any, what: str) -> Any:
    """A value, or what a string holds as JSON: files write both."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise DataError(f"{what} is not JSON: {value[:40]!r}") from None


def _exchange(pair: Any) -> tuple[Message, Message]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
        raise DataError(f"field 'history' must hold pairs [question, answer], got {str(pair)[:40]!r}")
    return Message("user", pair[0]), Message("assistant", pair[1])
