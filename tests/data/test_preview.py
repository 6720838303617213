"""What a reader is shown of a sample: the trained stretch marked, and no half of a character."""

from framework.data.preview import marked
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.train import train


def test_a_character_that_the_end_cuts_off_is_left_out() -> None:
    tokenizer = train(iter(["ab" * 3]), TokenizerConfig(kind=TokenizerKind.CHARACTER, vocab_size=263))
    ids = tokenizer.encode("<|user|>a<|end|>b春春")  # 春 is three bytes
    assert marked(tokenizer, ids, [False] * 3 + [True] * 7) == "<|user|>a<|end|>«b春春»"
    assert marked(tokenizer, ids[:-1], [False] * 3 + [True] * 6) == "<|user|>a<|end|>«b春»"
    spelled = tokenizer.encode("\ufffd")
    assert marked(tokenizer, spelled, [False] * 3) == "\ufffd", "here the tokens spell it"
