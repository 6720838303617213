"""What a record means: the field's formats, each a function from a record to a sample.

| format     | record                                                                                        |
|------------|-----------------------------------------------------------------------------------------------|
| text       | {"text": ...}; of a .txt the blocks between blank lines (the whole file where there are none) |
| lines      | as text, but every line of a .txt is a document: recognised where no blank line separates any |
| alpaca     | {"instruction", "output", "input"?, "system"?, "tools"?, "history"?: [[question, answer], ...]} |
| sharegpt   | {"conversations": [{"from": "human" or "gpt", "value"}], "system"?, "tools"?}                  |
| messages   | {"messages": [{"role", "content", "tool_calls"?}], "tools"?} (OpenAI)                          |
| preference | {"prompt"?, "chosen", "rejected", "margin"?}: strings, or messages (TRL)                      |
| hh         | {"chosen", "rejected"}: whole dialogues as text, "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF) |
| medicalgpt | {"question", "response_chosen", "response_rejected", "system"?, "history"?} (MedicalGPT)      |
| labelled   | {"prompt", "completion", "label": true or false}: one answer, good or bad (KTO in TRL)        |
| classified | {"text", "label"}, {"text", "text_pair", "label"}: a word or whole number = a class, a fraction =  |
|            | to predict; GLUE's and CLUE's names too (sentence; sentence1, sentence2; premise, hypothesis; ...) |
| verl       | {"prompt": messages, "reward_model": {"ground_truth"}, "data_source"?, "extra_info"?} (verl)   |
| prompt     | {"prompt": string or messages, "answer"?}                                                     |

An extension registers another with `@register("data_format", name)`: a function from a record to a sample, raising
DataError for a record that it cannot take; the reader adds file and line. A null field counts as absent. Left out:
where records come from, and which file is of which format (`sources`).
"""

import itertools
import json
import math
from collections.abc import Callable

from framework.core.errors import DataError
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
from framework.data import turns
from framework.data.fields import field, listing, number, string, wrong
from framework.data.files import Record

Format = Callable[[Record], Sample]

# How data sets call a text, or two: GLUE, SuperGLUE, CLUE, transformers. The first whose fields are all there decides.
_TEXTS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)

# A record with all these fields is of that format; the first that fits decides.
_MARKS = {
    "medicalgpt": ("question", "response_chosen", "response_rejected"),
    "preference": ("chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "verl": ("prompt", "reward_model"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "prompt": ("prompt",),
}


def format_of(record: Record) -> str:
    """The format that a record's fields tell."""
    for name, fields in _MARKS.items():
        if name == "text" and "label" in record and _texts(record):
            return "classified"
        if all(field in record for field in fields):
            return "hh" if name == "preference" and turns.is_dialogue(record["chosen"]) else name
    wanted = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in _MARKS.items())
    raise DataError(f"no known format has the fields {listing(record)} (known: {wanted})")


@register("data_format", "text")
def text(record: Record) -> TextSample:
    """{"text": "..."}"""
    return TextSample(string(record, "text"))


@register("data_format", "lines")
def lines(record: Record) -> TextSample:
    """As text; the reader gives it a .txt line by line."""
    return text(record)


@register("data_format", "alpaca")
def alpaca(record: Record) -> ConversationSample:
    """Instruction and input become one user turn, on two lines."""
    asked = [string(record, "instruction"), string(record, "input", "")]
    last = (Message("user", "\n".join(filter(None, asked))), Message("assistant", string(record, "output")))
    return ConversationSample((*turns.opening(record), *turns.history(record), *last))


@register("data_format", "sharegpt")
def sharegpt(record: Record) -> ConversationSample:
    """Turns with "from" and "value"."""
    return ConversationSample((*turns.opening(record), *turns.sharegpt(record, "conversations")))


@register("data_format", "messages")
def messages(record: Record) -> ConversationSample:
    """OpenAI's chat format."""
    return ConversationSample((*turns.opening(record), *turns.messages(record, "messages")))


@register("data_format", "preference")
def preference(record: Record) -> PreferenceSample:
    """Two answers to one prompt. Answers given as messages may repeat the prompt; without "prompt" they must."""
    chosen, rejected = turns.answer(record, "chosen"), turns.answer(record, "rejected")
    asked = turns.prompt(record) if "prompt" in record else _shared(chosen, rejected)
    if not asked:
        raise DataError("needs the field 'prompt', or 'chosen' and 'rejected' as messages that begin with it")
    return _pair((*turns.opening(record), *asked), asked, chosen, rejected, number(record, "margin"))


@register("data_format", "hh")
def hh(record: Record) -> PreferenceSample:
    """Anthropic's HH-RLHF: two dialogues that differ in what the assistant says last."""
    chosen, rejected = (turns.dialogue(string(record, name), name) for name in ("chosen", "rejected"))
    asked = _shared(chosen, rejected)
    return _pair(asked, asked, chosen, rejected)


@register("data_format", "medicalgpt")
def medicalgpt(record: Record) -> PreferenceSample:
    """MedicalGPT's pairs."""
    question = Message("user", string(record, "question"))
    prompt = (*turns.opening(record), *turns.history(record), question)
    return PreferenceSample(prompt, string(record, "response_chosen"), string(record, "response_rejected"))


@register("data_format", "labelled")
def labelled(record: Record) -> LabelledSample:
    """One answer and whether it is good."""
    asked, label = turns.prompt(record), field(record, "label")
    if not isinstance(label, bool):
        raise wrong("label", "true or false", label)
    answer = turns.behind(asked, turns.answer(record, "completion"), "completion")
    return LabelledSample((*turns.opening(record), *asked), answer, label)


@register("data_format", "classified")
def classified(record: Record) -> ClassifiedSample:
    """A text or two with a label. Of true and false the words are the classes."""
    names, label = _texts(record), field(record, "label")
    if not names:
        known = "; ".join(", ".join(fields) for fields in _TEXTS)
        raise DataError(f"has no text: its fields are {listing(record)} (known: {known})")
    if isinstance(label, bool):
        label = str(label).lower()
    if not isinstance(label, str | int | float) or label != label or label in (math.inf, -math.inf):
        raise wrong("label", "a word or a number", label)
    first, *second = (string(record, name) for name in names)
    return ClassifiedSample(first, second[0] if second else None, label)


def _texts(record: Record) -> tuple[str, ...]:
    """The names of a record's texts; () where it has none."""
    return next((fields for fields in _TEXTS if all(name in record for name in fields)), ())


@register("data_format", "verl")
def verl(record: Record) -> PromptSample:
    """verl's prompts with what is true. An answer that is no text is kept as JSON; "data_source" and "extra_info" say
    nothing that a prompt needs."""
    judged = field(record, "reward_model")
    if not isinstance(judged, dict):
        raise wrong("reward_model", "an object with 'ground_truth'", judged)
    truth = judged.get("ground_truth")
    answer = truth if truth is None or isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)
    return PromptSample(turns.prompt(record), answer)


@register("data_format", "prompt")
def prompt(record: Record) -> PromptSample:
    """What to answer, for reinforcement learning; "answer" is the reference where a task has one."""
    asked = (*turns.opening(record), *turns.prompt(record))
    return PromptSample(asked, string(record, "answer") if "answer" in record else None)


def _shared(chosen: turns.Turns, rejected: turns.Turns) -> turns.Turns:
    """The turns with which both begin, less the last of each."""
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1]))
    return tuple(first for first, _ in shared)


def _pair(
    prompt: turns.Turns, asked: turns.Turns, chosen: turns.Turns, rejected: turns.Turns, margin: float | None = None
) -> PreferenceSample:
    """`asked` is the part of `prompt` that the answers may repeat."""
    answers = (turns.behind(asked, chosen, "chosen"), turns.behind(asked, rejected, "rejected"))
    return PreferenceSample(prompt, *answers, margin)
