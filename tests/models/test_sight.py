"""Which tokens a token sees, for every architecture: its state has a gradient by those and by no other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from framework.models.config import Architecture, ModelConfig, RopeScaling, Scaling
from framework.models.kv_cache import KVCache
from framework.models.transformer import Transformer
from tests.models.drawn import drawn, tokens

MODELS = {
    architecture: drawn(
        ModelConfig(architecture, vocab_size=37, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24),
        dtype=torch.float64,
    )
    for architecture in Architecture
}


def sight(model: Transformer, x: Tensor, **inputs: Tensor) -> Tensor:
    """[T,T]: how much the state of each token (rows) moves with each token's embedding."""
    assert model.embedding is not None
    embedded = model.embedding(x).detach().requires_grad_()
    embedding, model.embedding = model.embedding, None
    try:
        hidden = model(embedded, **inputs)[0]
        seen = [torch.autograd.grad(state.sum(), embedded, retain_graph=True)[0][0] for state in hidden]
    finally:
        model.embedding = embedding
    return torch.stack(seen).abs().amax(-1)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(Architecture)), st.data())
def test_a_token_s_state_moves_with_what_it_may_see_and_nothing_else(kind: Architecture, data: st.DataObject) -> None:
    """Packed documents and padding; the prefix of each is drawn. Exactly zero where nothing is seen."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    padding = data.draw(st.integers(0, 2))
    prefixes = [data.draw(st.integers(0, size)) for size in sizes]
    ids = torch.tensor([[*(n for n, size in enumerate(sizes, 1) for _ in range(size)), *[0] * padding]])
    places = torch.tensor([[*(p for size in sizes for p in range(size)), *[0] * padding]])
    prefix = torch.tensor([[*(p for p, size in zip(prefixes, sizes) for _ in range(size)), *[0] * padding]])
    inputs = {"prefix_lengths": prefix} if kind is Architecture.PREFIX else {}
    if kind is Architecture.ENCODER_DECODER:
        states = MODELS[kind].encode(tokens(1, ids.shape[1], seed=2), ids)
        inputs = {"encoder_tokens": states, "encoder_document_ids": ids}
    moved = sight(MODELS[kind], tokens(1, ids.shape[1]), positions=places, document_ids=ids, **inputs) > 0
    for query in range(sum(sizes)):
        for key in range(ids.shape[1]):
            looks = {Architecture.ENCODER: True, Architecture.PREFIX: bool(places[0, key] < prefix[0, key])}
            ahead = looks.get(kind, False)
            expected = bool(ids[0, query] == ids[0, key]) and (key <= query or ahead)
            assert bool(moved[query, key]) == expected, (query, key)


def test_dynamic_scaling_lets_a_token_know_how_long_its_document_is_and_no_more() -> None:
    """Documents around an original context of 4, packed. The gradient cannot tell: a length is a whole number. So
    tokens are exchanged, and documents made longer, and bits compared."""
    config = replace(MODELS[Architecture.CAUSAL].config, rope_scaling=RopeScaling(Scaling.DYNAMIC, 3.0, 4))
    model, draw = drawn(config, strict=True), torch.Generator().manual_seed(3)

    def states(sizes: list[int], x: Tensor) -> list[Tensor]:
        ids = torch.tensor([[n for n, size in enumerate(sizes, 1) for _ in range(size)]])
        places = torch.tensor([[p for size in sizes for p in range(size)]])
        hidden: Tensor = model(x[:, : sum(sizes)], positions=places, document_ids=ids)[0]
        return list(hidden.split(sizes))

    for sizes in ([9, 3, 6], [2, 4, 12], [5, 5, 8]):
        x = torch.randint(0, 37, (1, 19), generator=draw)
        before, first = states(sizes, x), sizes[0] + sizes[1] - 1
        for place in range(first, sum(sizes)):  # another token there, of the same length
            after = states(sizes, x.index_fill(1, torch.tensor([place]), int(x[0, place] + 1) % 37))
            flat, new = torch.cat(before), torch.cat(after)
            assert torch.equal(flat[:place], new[:place])
            assert not torch.equal(flat[place], new[place])
        longer = states([*sizes[:2], sizes[2] + 1], x)
        assert all(
            torch.equal(a, b) for a, b in zip(before[:2], longer[:2], strict=True)
        )  # another's length is nothing
        assert not torch.equal(before[2][1:], longer[2][1:-1])  # its own is
        within = states([3], x)
        assert torch.equal(states([4], x)[0][:3], within[0])  # but not up to the original context
    places, ids = torch.tensor([[*range(9), 0, 0], [*range(3), *[0] * 8]]), torch.tensor([[1] * 9 + [0] * 2] * 2)
    ids[1, 3:] = 0  # rows of one document need no ids, and padding at position 0 is none of it
    x, real = tokens(2, 11), ids > 0
    assert torch.equal(model(x, positions=places)[real], model(x, positions=places, document_ids=ids)[real])


@pytest.mark.parametrize("kind", [kind for kind in Architecture if kind is not Architecture.ENCODER_DECODER])
def test_rows_of_one_document_need_no_ids(kind: Architecture) -> None:
    model, x = MODELS[kind], tokens(2, 7)
    inputs = {"prefix_lengths": torch.tensor([3, 5])} if kind is Architecture.PREFIX else {}
    torch.testing.assert_close(
        model(x, **inputs), model(x, document_ids=torch.ones_like(x), **inputs), rtol=0, atol=1e-12
    )


def test_padding_behind_a_prefix_is_not_seen_whatever_its_positions() -> None:
    """As in rollouts, where the positions of padding are 0."""
    model, x = MODELS[Architecture.PREFIX], tokens(1, 7)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 0]])
    got = model(x, positions=places, prefix_lengths=torch.tensor([2]))
    torch.testing.assert_close(got[:, :5], model(x[:, :5], prefix_lengths=torch.tensor([2])), rtol=0, atol=1e-12)


def test_a_prefix_of_nothing_is_causal_and_one_of_all_an_encoder() -> None:
    kinds, x = MODELS, tokens(2, 7)
    prefix = kinds[Architecture.PREFIX]
    none, everything = (prefix(x, prefix_lengths=torch.tensor([n, n])) for n in (0, 7))
    torch.testing.assert_close(none, kinds[Architecture.CAUSAL](x), rtol=0, atol=1e-12)
    torch.testing.assert_close(everything, kinds[Architecture.ENCODER](x), rtol=0, atol=1e-12)


def test_decoding_behind_a_prefix_equals_the_full_forward() -> None:
    """Prompts of 3 and 5 tokens, each seen whole, read at once; then token by token."""
    model, x, lengths = MODELS[Architecture.PREFIX], tokens(2, 9), torch.tensor([3, 5])
    cache = KVCache(model.config, 2, 9, torch.float64)
    read = model(x[:, :5], positions=torch.arange(5).expand(2, -1), prefix_lengths=lengths, cache=cache.view(used=5))
    whole = model(x, prefix_lengths=lengths)
    torch.testing.assert_close(read[0, :3], whole[0, :3], rtol=0, atol=1e-12)
    torch.testing.assert_close(read[1], whole[1, :5], rtol=0, atol=1e-12)
    for step in range(4):
        places = (lengths + step).unsqueeze(1)
        state = model(x.gather(1, places), positions=places, cache=cache.view(used=int(places.max()) + 1))
        torch.testing.assert_close(state[:, 0], whole[torch.arange(2), places[:, 0]], rtol=0, atol=1e-12)
