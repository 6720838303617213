"""The assistant mask, against transformers' own and by hand; templates that rewrite earlier turns are refused."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer

from framework.core.errors import UsageError
from framework.core.records import Message, Tokenizer
from framework.data.chat_template import (
    UnstableTokens,
    render_answer,
    render_answers,
    render_conversation,
    render_conversations,
    render_prompt,
)
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.load import HubTokenizer
from framework.tokenization.train import train

CHAT = [
    Message("system", "s"),
    Message("user", "hi"),
    Message("assistant", "yo"),
    Message("user", "b"),
    Message("assistant", ""),
]
CHATML = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # as Qwen3: the thoughts of earlier turns are dropped
    "{% for m in messages %}{{ '<s>' + m.role + '\n' }}"
    "{{ m.content if loop.last else m.content.split('#')[-1] }}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def with_template(template: str, merges: Sequence[tuple[str, str]] = ()) -> HubTokenizer:
    tokens = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\n", *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges), byte_fallback=True))
    backend.decoder = decoders.ByteFallback()
    backend.add_special_tokens(["<s>", "</s>"])
    return HubTokenizer(backend, {"eos_token": "</s>"}, template)


def shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return b"".join(tokenizer.token_bytes(i) or f"[{i}]".encode() for i in ids).decode()


def test_by_hand(tokenizer: Tokenizer) -> None:
    """[1] starts and ends, [4] system, [2] user, [3] assistant: answers and ends are trained, nothing stands behind."""
    rendered = render_conversation(tokenizer, [*CHAT[:3], Message("user", "unanswered")])
    assert shown(tokenizer, rendered.ids) == "[1][4]s[1][2]hi[1][3]yo[1]"
    assert rendered.loss_mask == (False,) * 9 + (True,) * 3
    both = render_conversation(tokenizer, CHAT)
    assert shown(tokenizer, both.ids) == "[1][4]s[1][2]hi[1][3]yo[1][2]b[1][3][1]"
    assert [n for n, trained in enumerate(both.loss_mask) if trained] == [9, 10, 11, 16]


def test_only_the_answer_is_trained_after_a_prompt_with_answers(tokenizer: Tokenizer) -> None:
    rendered = render_answer(tokenizer, CHAT[:4], "ok")
    assert shown(tokenizer, rendered.ids).endswith("[3]yo[1][2]b[1][3]ok[1]")
    assert sum(rendered.loss_mask) == 3
    prompt = render_prompt(tokenizer, CHAT[:4])
    assert list(rendered.ids[: len(prompt)]) == prompt
    assert rendered.loss_mask.index(True) == len(prompt)


def test_nothing_to_train_without_an_assistant(tokenizer: Tokenizer) -> None:
    assert render_conversation(tokenizer, CHAT[:2]).ids == ()


@pytest.mark.parametrize("kind", list(TokenizerKind), ids=str)
def test_the_mask_is_transformers_own(kind: TokenizerKind, tmp_path: Path) -> None:
    """Their mask follows the template's generation marks through character offsets; ours compares prefixes."""
    ours = train(iter(["the cat sat on the mat 床前明月光 " * 3]), TokenizerConfig(kind=kind, vocab_size=320))
    ours.save(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    letters = "thecat床前月😀<|>é" + (
        "" if kind is TokenizerKind.WORDPIECE else " \n"
    )  # white space has no token there
    texts = st.text(st.sampled_from(letters), max_size=8)
    turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), texts), min_size=1, max_size=5)

    @settings(max_examples=60, deadline=None)
    @given(turns)
    def check(turns: list[tuple[str, str]]) -> None:
        messages = [Message(*turn) for turn in turns] + [Message("assistant", "the mat")]
        chat = [{"role": m.role, "content": m.content} for m in messages]
        expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        rendered = render_conversation(ours, messages)
        assert list(rendered.ids) == expected["input_ids"]
        assert list(map(int, rendered.loss_mask)) == expected["assistant_masks"]

    check()


def test_what_a_template_writes_behind_the_end_is_not_trained() -> None:
    tokenizer = with_template(CHATML)
    rendered = render_conversation(tokenizer, [Message("user", "q"), Message("assistant", "a"), *CHAT[3:]])
    trained = [i for i, trained in zip(rendered.ids, rendered.loss_mask) if trained]
    assert shown(tokenizer, trained) == "a[1][1]"
    assert rendered.ids[-1] == tokenizer.end_id, "the line feed behind the last end token is left out"
    assert shown(tokenizer, rendered.ids).startswith("[0]user\nq[1]\n[0]assistant\na[1]\n[0]user")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = with_template(FORGETFUL)
    one = [Message("user", "q"), Message("assistant", "thought#a")]
    assert shown(tokenizer, render_conversation(tokenizer, one).ids).endswith("thought#a[1]")
    message = re.escape(r"not prefix-stable: what read 'thought#a</s>\n' becomes 'a</s>\n<s>user\nq</s>\n")
    with pytest.raises(UsageError, match=message):
        render_conversation(tokenizer, [*one, *one])


def test_a_template_without_the_end_token_is_refused() -> None:
    tokenizer = with_template("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    with pytest.raises(UsageError, match=r"set eos_token in tokenizer_config\.json to the token that ends an answer"):
        render_answer(tokenizer, [Message("user", "q")], "a")


def test_an_answer_that_begins_inside_a_token_is_told_apart() -> None:
    """The prompt ends with a line feed, the answer begins with one, and two of them are one token."""
    tokenizer = with_template(CHATML, merges=[("\n", "\n")])
    with pytest.raises(UnstableTokens, match="a token reaches across"):
        render_answer(tokenizer, [Message("user", "q")], "\na")
    assert render_answer(tokenizer, [Message("user", "q")], "a\n").ids[-1] == tokenizer.end_id
    unstable, whole = render_answers(tokenizer, [([Message("user", "q")], answer) for answer in ("\na", "a\n")])
    assert isinstance(unstable, UnstableTokens)
    assert whole == render_answer(tokenizer, [Message("user", "q")], "a\n")


def test_rendered_together_equals_rendered_one_by_one(tokenizer: Tokenizer) -> None:
    prompts = [CHAT[:1], CHAT[:3], CHAT]
    one_by_one = [render_conversation(tokenizer, messages) for messages in prompts]
    assert render_conversations(tokenizer, prompts) == one_by_one
    assert render_conversations(tokenizer, []) == []
    pairs = [(CHAT[:2], "ok"), (CHAT[:4], "")]
    assert render_answers(tokenizer, pairs) == [render_answer(tokenizer, *pair) for pair in pairs]
