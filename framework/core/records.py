"""The typed data that rooms hand to one another. Everything a batch can be is on this page.

Shapes: B rows, T tokens a row. True in a mask means "counts". Tensor records are frozen dataclasses registered as
pytrees; they split, concatenate, select and move whole. Alignment, once and for all:

- the **prediction position** t is where the model, having read tokens[b, :t+1], predicts labels[b, t] (= tokens[b, t+1]
  within a document). Engines and Scores speak of prediction positions.
- the **token position** t speaks of tokens[b, t] itself: log_probs[b, t] = log p(tokens[b, t] | tokens[b, :t]) and
  values[b, t] = V(tokens[b, :t]). Every RL tensor speaks of token positions. `align` is the one way there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar, cast, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

R = TypeVar("R", bound="Record")


class Record:
    """What all tensor records share. Fields are tensors with the batch first, records, or None."""

    def __len__(self) -> int:
        return len(next(leaf for leaf in pytree.tree_leaves(self) if isinstance(leaf, Tensor)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        mapped = pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, self)
        return cast(Self, mapped)

    def to(self, device: torch.device | str) -> Self:
        """The same record on `device`; a copy from pinned memory to a GPU runs ahead of the host."""
        # Towards the CPU a copy must be waited for: the host could read the memory before the GPU has written it.
        ahead = torch.device(device).type != "cpu"
        return self._map(lambda leaf: leaf.to(device, non_blocking=ahead))

    def select(self, index: Tensor | slice) -> Self:
        """Rows by position (int64 tensor), mask (bool tensor) or slice, in the order given."""
        return self._map(lambda leaf: leaf[index])

    def split(self, size: int) -> list[Self]:
        """Consecutive parts of `size` rows, the last one as long as what remains."""
        return [self.select(slice(start, start + size)) for start in range(0, len(self), size)]

    @classmethod
    def concat(cls, parts: list[Self]) -> Self:
        """One record with the rows of `parts` one after another; T must agree, and so must what is None."""
        joined = pytree.tree_map(
            lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *parts
        )
        return cast(Self, joined)


@dataclass_transform(frozen_default=True)
def record(cls: type[R]) -> type[R]:
    """A frozen dataclass known to torch's pytrees: an unknown one would reach every pipeline micro-batch whole."""
    frozen: Any = dataclass(frozen=True, eq=False)(cls)
    names = [field.name for field in dataclasses.fields(frozen)]
    pytree.register_pytree_node(
        frozen,
        lambda item: ([getattr(item, name) for name in names], None),
        lambda values, _: frozen(*values),
        serialized_type_name=f"framework.{cls.__name__}",
    )
    return cast(type[R], frozen)


@record
class TokenBatch(Record):
    """Rows of tokens with what each position must predict.

    Two documents "a b c" and "d e" packed into a row of T=6, everything trained, 9 = end of text, 0 in the padding:
        tokens       [[1, 2, 3, 4, 5, 0]]
        labels       [[2, 3, 9, 5, 9, 0]]
        loss_mask    [[1, 1, 1, 1, 1, 0]]
        positions    [[0, 1, 2, 0, 1, 0]]
        document_ids [[1, 1, 1, 2, 2, 0]]      0 = padding; attention stays within equal ids
    """

    tokens: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, shifted: what position t predicts
    loss_mask: Tensor  # [B, T] bool, of the labels
    positions: Tensor  # [B, T] int64
    document_ids: Tensor  # [B, T] int64
    prefix_lengths: Tensor | None = None  # [B, T] int64: how many of its document's tokens all of it may see
    span_positions: Tensor | None = None  # [B, T] int64: the place in a hidden span, from 1 on; 0 in the text around
    token_types: Tensor | None = None  # [B, T] int64: which part of a pair a token is of
    source: TokenBatch | None = None  # [B, S]: what an encoder reads; of its labels none counts

    def inputs(self) -> TokenBatch:
        return self

    def lengths(self) -> Tensor:
        """[B, T] int64: how many tokens the document of each token has."""
        return document_lengths(self.positions, self.document_ids)


def document_lengths(positions: Tensor, document_ids: Tensor) -> Tensor:
    """[B, T] int64: the length of each token's document, by positions[B, T] within it and document_ids[B, T]."""
    longest = positions.new_zeros(len(positions), int(document_ids.max()) + 1)
    return longest.scatter_reduce(1, document_ids, positions + 1, "amax").gather(1, document_ids)


@record
class PreferenceBatch(Record):
    """Pairs of sequences: row b of `chosen` is preferred to row b of `rejected`; both padded to the same T."""

    chosen: TokenBatch
    rejected: TokenBatch
    margin: Tensor | None = None  # [B] float: by how much
    reference: Tensor | None = None  # [B, 2] float: log-prob of both answers before training

    def inputs(self) -> TokenBatch:
        """[2B, T]: the chosen rows, then the rejected ones."""
        return TokenBatch.concat([self.chosen, self.rejected])


@record
class ClassBatch(Record):
    """Sequences with what they are: the number of a class, or a number to predict.

    Two of three classes: label [2, 0]. Of a regression: label [3.8, 0.5].
    """

    rows: TokenBatch
    label: Tensor  # [B] int64: a class; float: the number itself

    def inputs(self) -> TokenBatch:
        return self.rows


@record
class PromptBatch(Record):
    """Prompts for generation, padded on the right.

    The prompts "7 8" (row 40 of the stream) and "5" (row 41):
        tokens [[7, 8], [5, 0]]   token_mask [[1, 1], [1, 0]]   row [40, 41]
    """

    tokens: Tensor  # [B, P] int64
    token_mask: Tensor  # [B, P] bool
    row: Tensor  # [B] int64: position in the prompt stream


@record
class Rollout(Record):
    """What a generator answered: prompt and response in one row, padded on the right. Token positions.

    Prompt "7 8", response "4 9" with 9 = end of text:
        tokens         [[7, 8, 4, 9, 0]]
        token_mask     [[1, 1, 1, 1, 0]]
        response_mask  [[0, 0, 1, 1, 0]]
        positions      [[0, 1, 2, 3, 0]]
        log_probs      [[0, 0, -1.2, -0.3, 0]]     behaviour policy, at the rollout temperature
        policy_version [[0, 0, 3, 3, 0]]
        finished       [True]                      it ended with a stop token, not at the length limit
    """

    tokens: Tensor  # [B, T] int64
    token_mask: Tensor  # [B, T] bool
    response_mask: Tensor  # [B, T] bool
    positions: Tensor  # [B, T] int64
    log_probs: Tensor  # [B, T] float
    policy_version: Tensor  # [B, T] int64
    finished: Tensor  # [B] bool
    row: Tensor  # [B] int64: position of the prompt in its stream
    sample: Tensor  # [B] int64: which of the prompt's samples

    def inputs(self) -> TokenBatch:
        """What the model reads: labels are the tokens shifted by one, the loss mask marks predicted response tokens,
        the prompt is the prefix."""
        prompt = (self.token_mask & ~self.response_mask).sum(1, keepdim=True)
        return TokenBatch(
            tokens=self.tokens,
            labels=_shift_left(self.tokens),
            loss_mask=_shift_left(self.response_mask),
            positions=self.positions,
            document_ids=self.token_mask.long(),
            prefix_lengths=prompt.expand_as(self.tokens),
        )


@record
class Experience(Record):
    """A rollout with everything PPO needs, all at token positions, zero outside the response.

    The rollout above, scored 1.0, KL coefficient 0.1, gamma = lambda = 1, values 0.2 and 0.5:
        old_log_probs [[0, 0, -1.2, -0.3, 0]]   reference_log_probs [[0, 0, -1.0, -0.3, 0]]
        rewards       [[0, 0, 0.02, 1.0, 0]]    values  [[0, 0, 0.2, 0.5, 0]]
        returns       [[0, 0, 1.02, 1.0, 0]]    advantages [[0, 0, 0.82, 0.5, 0]] before whitening
    """

    rollout: Rollout
    old_log_probs: Tensor  # [B, T] the trainer's own, before the update
    reference_log_probs: Tensor  # [B, T]
    values: Tensor  # [B, T] V(tokens[b, :t])
    rewards: Tensor  # [B, T]
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]

    def inputs(self) -> TokenBatch:
        return self.rollout.inputs()


@record
class Scores(Record):
    """What a Scorer says of rows, at prediction positions (see `align`)."""

    log_probs: Tensor  # [B, T] of labels, temperature applied
    entropy: Tensor | None = None  # [B, T] of the next-token distribution
    values: Tensor | None = None  # [B, T] the scalar head on every hidden state
    classes: Tensor | None = None  # [B, C] the class head on the last counting token of each row


@record
class Counts(Record):
    """By what a loss is divided: how much of each unit the whole optimizer step holds, over all ranks."""

    tokens: Tensor  # [1] labels that count
    sequences: Tensor  # [1] rows
    pairs: Tensor  # [1] preference pairs


Rows = TokenBatch | PreferenceBatch | ClassBatch | Rollout | Experience
Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, weight), both scalars; the mean is sum / weight


def count(rows: Rows) -> Counts:
    """The counts of one rank's rows."""
    device = rows.inputs().tokens.device
    pairs = len(rows) if isinstance(rows, PreferenceBatch) else 0
    return Counts(
        tokens=rows.inputs().loss_mask.sum().reshape(1),
        sequences=torch.tensor([len(rows)], device=device),
        pairs=torch.tensor([pairs], device=device),
    )


def labels_of(rows: Rows) -> Rows:
    """The same record of the labels that count alone, in the order of rows.inputs().loss_mask: of entries [B, T] those
    that speak of a label, of entries [B] its row's -> [M] each. What a pointwise loss is given. Left out: an encoder's
    source, and what a row says besides its inputs of pairs and classes.

    The two answers 4 and 9 of `Rollout`'s example: tokens [4, 9]   log_probs [-1.2, -0.3]   finished [True, True]
    """
    if isinstance(rows, Rollout | Experience):
        mask = (rows.rollout if isinstance(rows, Experience) else rows).response_mask
    else:
        rows = dataclasses.replace(rows.inputs(), source=None)
        mask = rows.loss_mask
    place = mask.nonzero(as_tuple=True)
    return rows._map(lambda x: x[place] if x.dim() > 1 else x[place[0]])


def align(x: Tensor) -> Tensor:
    """From prediction positions to token positions: [B, T] -> [B, T], one step to the right, zero in front."""
    return torch.cat([x.new_zeros(x.shape[0], 1), x[:, :-1]], dim=1)


def _shift_left(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], x.new_zeros(x.shape[0], 1)], dim=1)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. Example: Message("user", "以「春」字作五言一联。").

    A turn of the role "tools" stands first where there is one: the functions that may be called, as JSON.
    """

    role: str  # system | user | assistant | tool | tools
    content: str
    tool_calls: str = ""  # an assistant's calls as JSON: [{"name": "weather", "arguments": {"city": "長安"}}]


@dataclass(frozen=True)
class TextSample:
    """A document to pretrain on."""

    text: str


@dataclass(frozen=True)
class ConversationSample:
    """A conversation to imitate; the assistant's turns are trained."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PreferenceSample:
    """One prompt, two answers, the first one preferred."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True)
class LabelledSample:
    """One answer to a prompt, and whether it is a good one."""

    prompt: tuple[Message, ...]
    answer: str
    good: bool


@dataclass(frozen=True)
class ClassifiedSample:
    """A text, or two, and what they are: a class (a word or a whole number), or a fraction to predict.

    Example: ClassifiedSample("明月幾時有", None, "poem"), ClassifiedSample("A man runs.", "A man sits.", 1.6).
    """

    text: str
    pair: str | None
    label: str | int | float


@dataclass(frozen=True)
class PromptSample:
    """A prompt to answer, with the reference answer where the data has one."""

    prompt: tuple[Message, ...]
    answer: str | None = None


@dataclass(frozen=True)
class Completion:
    """One response of a policy, as text for whoever rewards it. Example: Completion("2+2=", "4", True, 0.7, "4")."""

    prompt: str  # as the tokenizer decodes it, its special tokens left out
    response: str  # without the end token
    finished: bool  # it ended by itself, not at the length limit
    score: float | None  # the reward model's; None where the run has none
    reference: str | None = None  # the answer that the data give for the prompt; None where they give none


Sample = TextSample | ConversationSample | PreferenceSample | LabelledSample | ClassifiedSample | PromptSample


@dataclass(frozen=True)
class Rendered:
    """Token ids with what is trained. `loss_mask[i]` says whether ids[i] is a target. Example: ids (7, 8, 4, 9),
    loss_mask (False, False, True, True)."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


class Tokenizer(Protocol):
    """What rooms may ask of a tokenizer; `tokenization.load` returns one. No room asks what library it wraps."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_id(self) -> int: ...  # ends a document and an answer
    @property
    def bos_id(self) -> int | None: ...  # in front of a document, where the tokenizer wants one
    @property
    def mask_id(self) -> int | None: ...  # stands for a hidden token, where the tokenizer has one
    @property
    def start_id(self) -> int: ...  # in front of what a decoder writes beside an encoder
    @property
    def sentinel_ids(self) -> tuple[int, ...]: ...  # stand for hidden spans, one after another; () where it has none
    @property
    def fingerprint(self) -> str: ...  # equal for tokenizers that give equal ids and equal templates
    def encode(self, text: str) -> list[int]: ...  # adds no special tokens, recognises those in `text`
    def encode_many(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...  # the bytes a token adds to a text; b"" for special tokens
    def token_text(self, token_id: int) -> str: ...  # a token as the vocabulary spells it, for showing
    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str: ...  # the chat template's text
    def save(self, folder: str) -> None: ...


Box = tuple[tuple[int, int], ...]  # of a shard in its logical tensor: (offset, length) per dimension
ReadBox = Callable[[str, Box], Tensor]  # a source of weights: (logical name, box) -> that part, on the CPU


def whole(shape: Sequence[int]) -> Box:
    """The box that is the whole tensor."""
    return tuple((0, int(size)) for size in shape)
