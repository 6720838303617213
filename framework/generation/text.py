"""Text in, text out, over any generator: what `framework generate` and `chat`, samples in reports and evaluation use.

Left out: chat templates. A prompt is text as the model is to read it (a document's beginning, or a conversation that
its template has rendered), or ids.
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
from framework.models.hub import locate, read_folder
from framework.models.init import parameter_shapes
from framework.tokenization.load import load as load_tokenizer

Prompt = str | Sequence[int]


def load_generator(
    folder: str, generation: GenerationConfig, device: str = "auto", pause: Callable[[], None] = lambda: None
) -> tuple[NativeGenerator, Tokenizer]:
    """The model of a Hugging Face folder, ready to generate, and its tokenizer, whose end token stops an answer.
    `pause`: see NativeGenerator."""
    path = locate(folder)
    tokenizer = load_tokenizer(path)
    config, read, _ = read_folder(path)
    generator = NativeGenerator(config, generation, (tokenizer.end_id,), choose_device(device), pause)
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
    rollout = generator.generate(prompt_batch(tokenizer, prompts, first_row), sampling, samples, seed)
    texts = [answer_text(tokenizer, ids) for ids in responses(rollout)]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def stream_text(
    generator: NativeGenerator, tokenizer: Tokenizer, prompt: Prompt, sampling: SamplingConfig, seed: int = 0
) -> Iterator[str]:
    """The pieces of one answer as they are drawn; together what `generate_text` would answer to that one prompt."""
    text = TextStream(tokenizer)
    for token in generator.stream(prompt_ids(tokenizer, prompt), sampling, seed):
        if piece := text.push(token):
            yield piece


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids as they are; text encoded, behind the token that starts a document where the tokenizer wants one. Text that
    begins with a special token says itself how it begins: chat templates are trained without another in front."""
    if not isinstance(prompt, str):
        return list(prompt)
    ids = tokenizer.encode(prompt)
    begins_itself = bool(ids) and tokenizer.token_bytes(ids[0]) == b""
    return ids if tokenizer.bos_id is None or begins_itself else [tokenizer.bos_id, *ids]


def prompt_batch(tokenizer: Tokenizer, prompts: Sequence[Prompt], first_row: int = 0) -> PromptBatch:
    """Prompts as a generator takes them, padded on the right; prompt i is row first_row + i of the stream."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    for i, (prompt, row) in enumerate(zip(prompts, ids, strict=True)):
        if not row:
            raise UsageError(f"prompt {i} is empty ({prompt!r}): the model needs at least one token to go on from")
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    tokens[mask] = torch.tensor([token for row in ids for token in row])
    return PromptBatch(tokens=tokens, token_mask=mask, row=first_row + torch.arange(len(ids)))


def responses(rollout: Rollout) -> list[list[int]]:
    """The ids of each response without its stop token."""
    rows = zip(rollout.tokens, rollout.response_mask, rollout.finished.tolist(), strict=True)
    ids = [(tokens[mask].tolist(), finished) for tokens, mask, finished in rows]
    return [row[:-1] if finished else row for row, finished in ids]
