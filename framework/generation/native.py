"""The native generator: weights of its own, a KV cache, continuous batching. Works wherever torch does.

It never calls a sharded module: ranks that decode different numbers of tokens would wait for each other for ever. Left
out: speculative decoding, prefix sharing between prompts, and quantised weights.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from framework.checkpoint.integrity import tensor_hash
from framework.core.config import require
from framework.core.errors import UsageError, nearest
from framework.core.records import PromptBatch, Rollout
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.decoding import Board, Decoding, OneToken, next_logits
from framework.generation.reading import Source
from framework.models.attention import Attention
from framework.models.config import Architecture, LoraConfig, ModelConfig, Position
from framework.models.layers import MLP
from framework.models.lora import attach
from framework.models.transformer import Transformer


class NativeGenerator:
    """Implements `protocol.Generator` on one device, in fp32 unless `dtype` says otherwise.

    With `generation.strict` a row's bits depend on the weights, its prompt, its coordinates and `width` alone: not on
    the number of slots nor on the other rows; and its log-probs are those of a strict Scorer on rows of that width.
    Where an encoder reads the prompts, also on the length that they are padded to.
    """

    def __init__(
        self,
        config: ModelConfig,
        generation: GenerationConfig,
        stop_ids: Sequence[int],
        device: torch.device | str = "cpu",
        pause: Callable[[], None] = lambda: None,
        lora: LoraConfig | None = None,
        start_id: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        """`pause` is called whenever rows have grown by a token, and may raise: what was begun is forgotten. `lora`: an
        adapter beside the model, whose tensors are loaded too. `start_id`: what a decoder beside an encoder begins
        with (T5: its pad token, 0). `dtype`: of weights, which are rounded to it as they come, and of the cache; a
        sampled token's log-prob is fp32."""
        require(
            config.architecture is not Architecture.ENCODER and config.position is not Position.ROTARY_2D,
            f"a model of architecture={config.architecture}, position={config.position} writes no text here: only "
            "causal, prefix and encoder_decoder models with one kind of positions do",
        )
        require(generation.slots >= 1, f"generation.slots={generation.slots} must be at least 1")
        require(
            config.encoder is None or 0 <= start_id < config.vocab_size,
            f"start_id={start_id} is no token of the model's vocabulary of {config.vocab_size}",
        )
        self.config = config
        self.reads_apart = config.encoder is not None
        self.start_id = start_id
        self.slots = generation.slots
        self.device = torch.device(device)
        self.pause = pause
        self.version = -1
        with torch.device("meta"):
            model = Transformer(config, strict=generation.strict)
            if lora is not None:
                attach(model, lora)
        self._model = model.to(dtype).to_empty(device=self.device).requires_grad_(False).eval()
        if not generation.strict and lora is None:  # the joined product rounds otherwise than the trainer's
            _join(self._model)
        self._one_token = _compiled() if generation.compile else None
        self._parameters = dict(self._model.named_parameters())
        self._versions: dict[str, int] = {}
        self._stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=self.device)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy (logical name, full tensor) of policy `version`; parts may come in several calls. Generating needs every
        tensor at one version, so that a publication cut short is never sampled from."""
        for name, tensor in weights:
            parameter = self._parameters.get(name)
            if parameter is None:
                raise UsageError(f"the generator's model has no tensor '{name}': {nearest(name, self._parameters)}")
            if parameter.shape != tensor.shape:
                raise UsageError(f"tensor '{name}' is {list(tensor.shape)}; this model's is {list(parameter.shape)}")
            parameter.copy_(tensor)
            self._versions[name] = version
        self.version = version

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingConfig,
        samples: int = 1,
        seed: int = 0,
        width: int | None = None,
    ) -> Rollout:
        """See the protocol; `width` defaults to the prompts' padded length (1 where an encoder reads them) +
        sampling.max_tokens. The rollout stands on the prompts' device."""
        self._require_whole_policy()
        board = self._board(prompts, sampling, samples, width)
        for _ in Decoding(self._model, board, sampling, self._stop_ids, self.slots, seed, self._one_token).run():
            self.pause()
        return _rollout(board, self.version).to(prompts.tokens.device)

    def stream(self, prompt: Sequence[int], sampling: SamplingConfig, seed: int = 0) -> Iterator[int]:
        """The tokens of one answer as they are drawn, its stop token left out: row 0, sample 0 of `generate`."""
        self._require_whole_policy()
        tokens = torch.tensor([list(prompt)], dtype=torch.int64)
        batch = PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
        board = self._board(batch, sampling, 1, None)
        for _ in Decoding(self._model, board, sampling, self._stop_ids, 1, seed, self._one_token).run():
            if not board.stopped[0]:
                yield int(board.tokens[0, board.lengths[0] - 1])

    def fingerprints(self) -> dict[str, int]:
        """The sharding-independent hash of every live tensor, by logical name."""
        return {name: tensor_hash(parameter) for name, parameter in self._parameters.items()}

    def _require_whole_policy(self) -> None:
        missing = [name for name in self._parameters if self._versions.get(name) != self.version]
        if missing:
            raise UsageError(
                f"{len(missing)} of the generator's {len(self._parameters)} tensors were not loaded with version "
                f"{self.version}, '{missing[0]}' among them; load all tensors of one policy before generating"
            )

    def _board(self, prompts: PromptBatch, sampling: SamplingConfig, samples: int, width: int | None) -> Board:
        require(samples >= 1, f"samples={samples} must be at least 1")
        width = width or (1 if self.reads_apart else prompts.tokens.shape[1]) + sampling.max_tokens
        lengths = _checked_lengths(prompts, self.config.vocab_size)
        (_check_apart if self.reads_apart else _check_room)(lengths, sampling.max_tokens, width, self.config)
        rows = len(prompts) * samples
        tokens = torch.zeros(rows, width, dtype=torch.int64, device=self.device)
        asked, source = torch.where(prompts.token_mask, prompts.tokens, 0).to(self.device), None
        if self.reads_apart:
            source = Source(asked, torch.from_numpy(lengths).to(self.device), samples)
            asked, lengths = torch.full((len(prompts), 1), self.start_id, device=self.device), np.ones_like(lengths)
        longest = int(lengths.max(initial=0))
        tokens[:, :longest] = asked[:, :longest].repeat_interleave(samples, 0)
        lengths = lengths.repeat(samples)
        return Board(
            tokens=tokens,
            source=source,
            log_probs=torch.zeros(rows, width, device=self.device),
            row=prompts.row.repeat_interleave(samples).to(self.device),
            sample=torch.arange(samples, device=self.device).repeat(len(prompts)),
            prompt_lengths=lengths,
            lengths=lengths.copy(),
            stopped=np.zeros(rows, dtype=bool),
        )


def _compiled() -> OneToken:
    """Nothing of a generator's model changes but numbers, so that no call has to look at its modules again."""
    unguarded = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    compiled: OneToken = torch.compile(next_logits, dynamic=False, options={"guard_filter_fn": unguarded})
    return compiled


def _join(model: Transformer) -> None:
    """Two products a layer for five."""
    for part in model.modules():
        if type(part) is Attention or isinstance(part, MLP):
            part.join()


def _checked_lengths(prompts: PromptBatch, vocab_size: int) -> np.ndarray:
    """Tokens of each prompt, or an error that names the first prompt that cannot be answered, and why."""
    mask = prompts.token_mask.cpu()
    lengths = mask.sum(1)
    for index in (lengths == 0).nonzero().flatten().tolist():
        raise UsageError(f"prompt {index} (row {int(prompts.row[index])}) is empty: it needs at least one token")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise UsageError("prompts must be padded on the right: token_mask has a True behind a False")
    unknown = mask & ((prompts.tokens.cpu() < 0) | (prompts.tokens.cpu() >= vocab_size))
    for index, place in unknown.nonzero().tolist():
        raise UsageError(
            f"prompt {index} holds token {int(prompts.tokens[index, place])}; the model's vocabulary has "
            f"{vocab_size}: take the tokenizer that the model was trained with"
        )
    return lengths.numpy()


def _check_room(lengths: np.ndarray, max_tokens: int, width: int, config: ModelConfig) -> None:
    """Prompts and answers in one row; with a dynamic scaling no longer than the original context, for beyond it every
    token turns the keys before it anew, and a cache keeps them as they were."""
    limits = {"the row width": width, "model.max_positions": config.max_positions}
    if config.scales_by_length:
        key = "the context in which dynamic rotary scaling leaves a cache's keys as they are, original_positions"
        limits = {key: config.rope_scaling.original_positions, **limits}
    for key, limit in limits.items():
        for index in (lengths + max_tokens > limit).nonzero()[0]:
            room = limit - max_tokens
            raise UsageError(
                f"prompt {index} has {lengths[index]} tokens; with max_tokens={max_tokens} it does not fit into "
                f"{key}={limit}: "
                + (f"prompts may have up to {room}" if room > 0 else f"max_tokens must be below {limit}")
            )


def _check_apart(lengths: np.ndarray, max_tokens: int, width: int, config: ModelConfig) -> None:
    """Prompts that an encoder reads, and rows that hold a start token and an answer. Relative positions (T5) have no
    end: from one distance on all share a number."""
    limit = width if config.position is Position.RELATIVE else min(width, config.max_positions)
    require(
        max_tokens < limit,
        f"max_tokens={max_tokens} behind a start token does not fit into rows of {limit}: choose at most {limit - 1}",
    )
    for index in (lengths > config.max_positions).nonzero()[0] if config.position is not Position.RELATIVE else ():
        raise UsageError(
            f"prompt {index} has {lengths[index]} tokens; the encoder reads model.max_positions={config.max_positions}"
        )


def _rollout(board: Board, version: int) -> Rollout:
    places = torch.arange(board.tokens.shape[1], device=board.tokens.device)
    lengths, prompt_lengths = (
        torch.from_numpy(x).to(board.tokens.device)[:, None] for x in (board.lengths, board.prompt_lengths)
    )
    token_mask = places < lengths
    response_mask = token_mask & (places >= prompt_lengths)
    return Rollout(
        tokens=board.tokens,
        token_mask=token_mask,
        response_mask=response_mask,
        positions=places * token_mask,
        log_probs=board.log_probs,
        policy_version=version * response_mask,
        finished=torch.from_numpy(board.stopped).to(board.tokens.device),
        row=board.row,
        sample=board.sample,
    )
