"""Regular Chinese verse, judged by its own rules: the form, the character that a line must end on, and the tones.

The corpus is recipes/corpora/tang; its README says how its prompts are made. Whether two characters rhyme is left out:
it needs a table of the sounds of Tang times, the tones only a classification that comes with the corpus.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from framework.core.errors import DataError
from framework.core.records import Message
from framework.core.registry import register
from framework.tasks.task import Task, corpus_folder

FREE_SAMPLES = 256
_COUPLET = re.compile(r"(\w{5}，\w{5}。|\w{7}，\w{7}。)")
_PROMPT = re.compile(r"(?P<line>\w+)，得(?P<rhyme>\w)字。")


@dataclass(frozen=True)
class Request:
    """A couplet to complete. Example: Request("白日依山盡", "流", "黃河入海流。") is asked as 白日依山盡，得流字。"""

    line: str
    rhyme: str  # the character to end on
    answer: str  # as the poet went on

    @property
    def prompt(self) -> str:
        return f"{self.line}，得{self.rhyme}字。"


@register("task", "verse_form")
def verse_form() -> Task[None]:
    """The share of free samples that are regular verse from the first character to the last."""
    return Task(
        name="verse_form",
        examples=lambda part: [None] * FREE_SAMPLES,
        prompt=lambda example: (),
        parse=str.strip,
        score=lambda example, text: float(is_regular(text)),
    )


@register("task", "assigned_rhyme")
def assigned_rhyme() -> Task[Request]:
    """The share of couplets completed in the form of their first line and on the character that was assigned."""
    return _completion("assigned_rhyme", lambda request, text: float(heeds(request, text)))


@register("task", "tone_pattern")
def tone_pattern() -> Task[Request]:
    """The share of completed couplets whose second line keeps the tones of regulated verse. No preference pair was made
    by breaking them, so they show what training for something else does to the rest."""
    return _completion("tone_pattern", lambda request, text: float(keeps_tones(text)))


def is_regular(text: str) -> bool:
    """Whether a text is couplets of one length, five or seven characters a line, ，within and 。 at the end of each."""
    couplets = _COUPLET.findall(text)
    return bool(couplets) and "".join(couplets) == text and len({len(couplet) for couplet in couplets}) == 1


def keeps_form(request: Request, text: str) -> bool:
    """Whether `text` is one line as long as the first one, closed by 。"""
    return re.fullmatch(rf"\w{{{len(request.line)}}}。", text) is not None


def heeds(request: Request, text: str) -> bool:
    """Whether `text` has the form of the first line and ends on the character asked for."""
    return keeps_form(request, text) and text.endswith(f"{request.rhyme}。")


def keeps_tones(text: str) -> bool:
    """Whether a second line of a couplet, e.g. 黃河入海流。, ends in a level tone and changes tone from its second
    character to its fourth to its sixth (Wang Li, "Shici gelü", 1962). A character of two tones fits either."""
    line = text.removesuffix("。")
    if len(line) not in (5, 7):
        return False
    places = [tones(character) for character in line[1:-1:2]]
    level, oblique = [[tone in place for place in places] for tone in ("level", "oblique")]
    starts_level = all((level, oblique)[i % 2][i] for i in range(len(places)))
    starts_oblique = all((oblique, level)[i % 2][i] for i in range(len(places)))
    return "level" in tones(line[-1]) and (starts_level or starts_oblique)


def tones(character: str) -> frozenset[str]:
    """The tone classes in which a character may be read: level, oblique, or both, as for one that the corpus lacks."""
    return _tone_table().get(character, frozenset(("level", "oblique")))


@functools.cache
def _tone_table() -> dict[str, frozenset[str]]:
    table = json.loads((corpus_folder("tang") / "tones.json").read_text(encoding="utf-8"))
    return {character: frozenset((name,)) for name in ("level", "oblique") for character in table[name]}


def _completion(name: str, score: Callable[[Request, str], float]) -> Task[Request]:
    return Task(
        name=name,
        examples=requests,
        prompt=lambda request: (Message("user", request.prompt),),
        parse=str.strip,
        score=score,
        recall=recall,
    )


def recall(prompt: str) -> Request | None:
    """What a prompt asks for; the poet's own answer is not known."""
    match = _PROMPT.search(prompt)
    return match and Request(match["line"], match["rhyme"], "")


@functools.cache
def requests(part: str) -> Sequence[Request]:
    """What a part's SFT examples ask for, with the poets' own second lines; in train some end otherwise."""
    path = corpus_folder("tang") / f"sft.{part}.jsonl"
    if not path.exists():
        raise DataError(f"there is no part '{part}'; choose train, valid or test", str(path))
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(_request(record["instruction"], record["output"]) for record in records)


def _request(prompt: str, answer: str) -> Request:
    match = _PROMPT.fullmatch(prompt)
    assert match, prompt
    return Request(match["line"], match["rhyme"], answer)
