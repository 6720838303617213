"""From messages to ids, with a mask of what the assistant wrote, by the tokenizer's own template.

An answer is what the template adds to a prompt: the ids of the conversation up to and with the answer, less those up
to where it begins. That is exactly what a generator sees and what it should say. It needs a prefix-stable template, one
that never rewrites what stands already, and is checked on every sample. Left out: templates' own `{% generation %}`
marks, which most templates lack.
"""

import itertools
from collections.abc import Sequence

from framework.core.errors import DataError, UsageError
from framework.core.records import Message, Rendered, Tokenizer


class UnstableTokens(DataError):
    """One sample whose answer begins inside a token that the prompt ends with; its mask has no exact boundary."""


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids up to where the assistant's answer begins."""
    return tokenizer.encode(tokenizer.render(messages, generation_prompt=True))


def render_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """Every assistant's turn is trained, its end token included; what follows the last one is left out.

    Example: <|user|> hi <|end|> <|assistant|> yo <|end|> is trained in its last two tokens.
    """
    return _only(render_conversations(tokenizer, [messages]))


def render_answer(tokenizer: Tokenizer, prompt: Sequence[Message], answer: str) -> Rendered:
    """Only the last turn is trained: `answer` and its end token."""
    return _only(render_answers(tokenizer, [(prompt, answer)]))


def render_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]
) -> list[Rendered | UnstableTokens]:
    """As `render_conversation`, tokenized in one call, which uses all cores; the error in the place of one sample."""
    turns = [[n for n, message in enumerate(each) if message.role == "assistant"] for each in conversations]
    return _render(tokenizer, conversations, turns)


def render_answers(
    tokenizer: Tokenizer, answers: Sequence[tuple[Sequence[Message], str]]
) -> list[Rendered | UnstableTokens]:
    """As `render_answer` for (prompt, answer) pairs, tokenized in one call."""
    conversations = [[*prompt, Message("assistant", answer)] for prompt, answer in answers]
    return _render(tokenizer, conversations, [[len(prompt)] for prompt, _ in answers])


def _render(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], turns: Sequence[Sequence[int]]
) -> list[Rendered | UnstableTokens]:
    texts = [
        [text for turn in each for text in _around(tokenizer, messages, turn)]
        for messages, each in zip(conversations, turns, strict=True)
    ]
    for shorter, longer in itertools.chain.from_iterable(map(itertools.pairwise, texts)):
        _check_prefix(shorter, longer)
    encoded = iter(tokenizer.encode_many([text for group in texts for text in group]))
    return [_masked(tokenizer.end_id, list(itertools.islice(encoded, len(group)))) for group in texts]


def _masked(end_id: int, encoded: list[list[int]]) -> Rendered | UnstableTokens:
    """From the ids before and after each answer in turn to those of the whole, with the answers marked."""
    if not encoded:
        return Rendered((), ())
    ids, mask = encoded[-1], list[bool]()
    try:
        for prompt, finished in zip(encoded[::2], encoded[1::2]):
            start, stop = _span(end_id, ids, prompt, finished)
            mask += [False] * (start - len(mask)) + [True] * (stop - start)
    except UnstableTokens as error:
        return error
    return Rendered(tuple(ids[: len(mask)]), tuple(mask))


def _only(rendered: list[Rendered | UnstableTokens]) -> Rendered:
    (one,) = rendered
    if isinstance(one, UnstableTokens):
        raise one
    return one


def _around(tokenizer: Tokenizer, messages: Sequence[Message], turn: int) -> tuple[str, str]:
    """The text up to where an answer begins, and up to where it is finished."""
    return tokenizer.render(messages[:turn], True), tokenizer.render(messages[: turn + 1], False)


def _check_prefix(shorter: str, longer: str) -> None:
    if longer.startswith(shorter):
        return
    at = next((n for n, (a, b) in enumerate(zip(shorter, longer)) if a != b), min(len(shorter), len(longer)))
    raise UsageError(
        f"the chat template is not prefix-stable: what read {shorter[at : at + 40]!r} becomes {longer[at : at + 40]!r} "
        "once the conversation goes on, so training would not see what a chat sees; give a template that only appends "
        "(chat_template.jinja), or samples with one answer"
    )


def _span(end_id: int, ids: list[int], prompt: list[int], finished: list[int]) -> tuple[int, int]:
    """[start, stop) of an answer in `ids`, its end token the last one."""
    if ids[: len(prompt)] != prompt or ids[: len(finished)] != finished:
        raise UnstableTokens("a token reaches across the beginning or the end of an answer")
    for stop in range(len(finished), len(prompt), -1):
        if finished[stop - 1] == end_id:
            return len(prompt), stop
    raise UsageError(
        "the chat template does not write the tokenizer's end token behind an answer, so a model could never learn to "
        "stop; set eos_token in tokenizer_config.json to the token that ends an answer"
    )
