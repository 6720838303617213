"""Text in, text out, over any generator: what `framework generate` and `chat`, samples in reports and evaluation use.

Left out: chat templates. A prompt is text as the model is to read it (a document's beginning, or a conversation that
its template has rendered; of an encoder a text with an end), or ids.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from framework.core.errors import UsageError
from framework.core.records import PromptBatch, Rollout, Tokenizer, whole
from framework.core.runtime import choose_device
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.native import NativeGenerator
from framework.generation.protocol import Generator
from framework.generation.stream import TextStream, answer_text
from framework.models.hub import locate, read_folder, read_start
from framework.models.init import parameter_shapes
from framework.tokenization.load import load as load_tokenizer

Prompt = str | Sequence[int]


def load_generator(
    folder: str, generation: GenerationConfig, device: str = "auto", pause: Callable[[], None] = lambda: None
) -> tuple[NativeGenerator, Tokenizer]:
    """The model of a Hugging Face folder, ready to generate, and its tokenizer, whose end token stops an answer.
    `pause`: see NativeGenerator. A decoder beside an encoder begins as the folder says, else as the tokenizer does."""
    path = locate(folder)
    tokenizer = load_tokenizer(path)
    config, read, _ = read_folder(path)
    begin = read_start(path) if config.encoder else 0
    start_id = tokenizer.start_id if begin is None else begin
    stop_ids, place = (tokenizer.end_id,), choose_device(device)
    generator = NativeGenerator(config, generation, stop_ids, place, pause, start_id=start_id)
    generator.load(((name, read(name, whole(shape))) for name, shape in parameter_shapes(config).items()), version=0)
    return generator, tokenizer


def generate_text(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    samples: int = 1,
    seed: int = 0,
    first_row: int = 0,
) -> list[list[str]]:
    """`samples` answers to each prompt, without the prompt and without the stop token. Prompt i is row first_row + i of
    its stream: its random numbers do not depend on which other prompts are asked, nor in how many calls."""
    if not prompts:
        return []
    asked = prompt_batch(tokenizer, prompts, first_row, generator.reads_apart)
    spell = text_apart if generator.reads_apart else answer_text
    texts = [spell(tokenizer, ids) for ids in responses(generator.generate(asked, sampling, samples, seed))]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def stream_text(
    generator: NativeGenerator, tokenizer: Tokenizer, prompt: Prompt, sampling: SamplingConfig, seed: int = 0
) -> Iterator[str]:
    """The pieces of one answer as they are drawn; together what `generate_text` would answer to that one prompt. Of a
    model whose encoder reads prompts a UsageError: it continues nothing."""
    if generator.reads_apart:
        raise UsageError("a model with an encoder answers a text with a whole one: use generate_text")
    text = TextStream(tokenizer)
    for token in generator.stream(prompt_ids(tokenizer, prompt), sampling, seed):
        if piece := text.push(token):
            yield piece


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, ended: bool = False) -> list[int]:
    """Ids as they are; text encoded, behind the token that starts a document where the tokenizer wants one. Text that
    begins with a special token says itself how it begins: chat templates are trained without another in front.
    `ended`: for an encoder, in front of the end token, which is not put there twice."""
    if not isinstance(prompt, str):
        return list(prompt)
    ids = tokenizer.encode(prompt)
    begins_itself = bool(ids) and tokenizer.token_bytes(ids[0]) == b""
    ids = ids if tokenizer.bos_id is None or begins_itself else [tokenizer.bos_id, *ids]
    return [*ids, tokenizer.end_id] if ended and ids[-1:] != [tokenizer.end_id] else ids


def prompt_batch(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], first_row: int = 0, ended: bool = False
) -> PromptBatch:
    """Prompts as a generator takes them, padded on the right; prompt i is row first_row + i of the stream. `ended`: see
    `prompt_ids`."""
    ids = [prompt_ids(tokenizer, prompt, ended) for prompt in prompts]
    for i, (prompt, row) in enumerate(zip(prompts, ids, strict=True)):
        if not row:
            raise UsageError(f"prompt {i} is empty ({prompt!r}): the model needs at least one token to go on from")
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    tokens[mask] = torch.tensor([token for row in ids for token in row])
    return PromptBatch(tokens=tokens, token_mask=mask, row=first_row + torch.arange(len(ids)))


def text_apart(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A text that continues none: without the space by which some tokenizers begin a word, and so a text (Unigram)."""
    text = answer_text(tokenizer, ids)
    return text[1:] if text.startswith(" ") and not tokenizer.decode(ids).startswith(" ") else text


def responses(rollout: Rollout) -> list[list[int]]:
    """The ids of each response without its stop token."""
    rows = zip(rollout.tokens, rollout.response_mask, rollout.finished.tolist(), strict=True)
    ids = [(tokens[mask].tolist(), finished) for tokens, mask, finished in rows]
    return [row[:-1] if finished else row for row, finished in ids]
