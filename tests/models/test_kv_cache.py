"""Cached decoding equals the full forward: near for fused attention, bit for bit in strict mode, in any schedule."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_ext.linear_log_probs.op import log_softmax
from framework.core.records import Rollout
from framework.core.runtime import num_threads
from framework.models.config import Activation, Bias, ModelConfig, Norm, NormPlace, Position
from framework.models.kv_cache import KVCache
from framework.models.scorer import Scorer
from framework.models.transformer import Transformer
from tests.models.drawn import LATER_AXES, TINY, drawn, tokens

AXES = {
    "llama": TINY,
    "untied, biases, wide heads": replace(
        TINY, hidden_size=40, head_dim=16, tied=False, attention_bias=Bias.ALL, vocab_size=301
    ),
    "gpt": replace(TINY, position=Position.LEARNED, norm=Norm.LAYER, activation=Activation.GELU_TANH, mlp_bias=True),
    "post, erf": replace(TINY, norm=Norm.LAYER, norm_place=NormPlace.POST, activation=Activation.GELU),
    "no positions, relu": replace(TINY, position=Position.NONE, activation=Activation.RELU),
    "larger": replace(TINY, vocab_size=2500, hidden_size=96, head_dim=24, num_kv_heads=0, intermediate_size=0),
    **LATER_AXES,
}
SLOTS, WIDTH = 3, 21


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with num_threads(request.param):
        yield request.param


@torch.no_grad()
def decode(model: Transformer, rows: Tensor, lengths: list[int], prompts: list[int]) -> Tensor:
    """Log-probs[R, WIDTH] of each row's tokens behind its prompt, by continuous batching: slots are filled as they fall
    free, so that every row shares its steps with others, at other positions."""
    cache = KVCache(model.config, SLOTS, WIDTH)
    found = torch.zeros(rows.shape, dtype=torch.float32)
    waiting, holds, read = list(range(len(rows))), dict[int, int](), dict[int, int]()

    def note(row: int, place: int, hidden: Tensor) -> None:
        table = log_softmax(model.logits(hidden), 0.7)
        if place + 1 < lengths[row]:
            found[row, place + 1] = table[0, rows[row, place + 1]]

    while waiting or holds:
        free = [slot for slot in range(SLOTS) if slot not in holds][: len(waiting)]
        if free:
            fresh = [waiting.pop(0) for _ in free]
            holds |= dict(zip(free, fresh, strict=True))
            longest = max(prompts[row] for row in fresh)
            places = torch.arange(longest).expand(len(free), -1)
            hidden = model(rows[fresh, :longest], positions=places, cache=cache.view(torch.tensor(free), longest))
            for i, row in enumerate(fresh):
                read[row] = prompts[row]
                note(row, prompts[row] - 1, hidden[i : i + 1, prompts[row] - 1])
        places = torch.tensor([[read[holds[s]]] if s in holds else [0] for s in range(SLOTS)])
        ids = torch.tensor([[int(rows[holds[s], read[holds[s]]])] if s in holds else [0] for s in range(SLOTS)])
        hidden = model(ids, positions=places, cache=cache.view(used=int(places.max()) + 1))
        for slot, row in list(holds.items()):
            note(row, read[row], hidden[slot])
            read[row] += 1
            if read[row] == lengths[row]:
                del holds[slot]
    return found


def rollout(model: Transformer, rows: Tensor, lengths: list[int], prompts: list[int]) -> Rollout:
    place = torch.arange(WIDTH)
    text = place < torch.tensor(lengths).unsqueeze(1)
    response = text & (place >= torch.tensor(prompts).unsqueeze(1))
    nothing = torch.zeros(rows.shape)
    one = torch.zeros(len(rows), dtype=torch.long)
    return Rollout(
        rows * text, text, response, place * text, nothing, nothing.long(), torch.ones(len(rows)).bool(), one, one
    )


@pytest.mark.parametrize("config", AXES.values(), ids=AXES.keys())
def test_strict_decoding_has_the_bits_of_the_trainers_scorer(config: ModelConfig, threads: int) -> None:
    """Law On-policy: slots refilled, rows at other positions beside, padded prompts, stale entries behind them; the
    trainer scores all rows at once. Same bits."""
    lengths, prompts = [21, 9, 14, 20, 6, 17, 21], [3, 8, 1, 5, 5, 11, 20]
    rows = tokens(7, WIDTH, config.vocab_size)
    model = drawn(config, strict=True)
    batch = rollout(model, rows, lengths, prompts)
    with torch.no_grad():
        trained = Scorer(model, temperature=0.7)(batch).log_probs[:, :-1]
    found = decode(model, rows, lengths, prompts)[:, 1:]
    mask = batch.response_mask[:, 1:]
    assert mask.sum() > 50
    assert torch.equal(found[mask], trained[mask])
    assert len(found[mask].unique()) > 50


@pytest.mark.parametrize("config", AXES.values(), ids=AXES.keys())
def test_fused_decoding_is_near_the_full_forward(config: ModelConfig) -> None:
    lengths, prompts = [21, 9, 14, 20, 6], [3, 8, 1, 5, 5]
    rows = tokens(5, WIDTH, config.vocab_size)
    model = drawn(config)
    with torch.no_grad():
        table = log_softmax(model.logits(model(rows)), 0.7)[:, :-1].gather(2, rows[:, 1:, None]).squeeze(2)
    found = decode(model, rows, lengths, prompts)[:, 1:]
    mask = rollout(model, rows, lengths, prompts).response_mask[:, 1:]
    torch.testing.assert_close(found[mask], table[mask], rtol=0, atol=2e-5)


def test_a_prompt_may_be_read_in_pieces() -> None:
    model, x = drawn(dtype=torch.float64), tokens(2, 11)
    cache = KVCache(TINY, 2, 11, torch.float64)
    parts = [
        model(x[:, a:b], positions=torch.arange(a, b).expand(2, -1), cache=cache.view())
        for a, b in ((0, 4), (4, 5), (5, 11))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(x), rtol=0, atol=1e-12)


def test_a_view_touches_its_own_slots_and_the_length_is_rounded_up() -> None:
    model = drawn()
    cache = KVCache(TINY, 4, 13)
    assert cache.length == 16
    with torch.no_grad():
        model(tokens(2, 3), positions=torch.arange(3).expand(2, -1), cache=cache.view(torch.tensor([3, 1])))
    written = torch.stack(cache.keys).abs().amax(dim=(0, 2, 4)) > 0
    assert written.tolist() == [[slot in (1, 3) and place < 3 for place in range(16)] for slot in range(4)]


def test_a_position_beyond_the_length_is_an_error() -> None:
    with pytest.raises(IndexError):
        drawn()(tokens(1, 1), positions=torch.tensor([[8]]), cache=KVCache(TINY, 1, 8).view())
