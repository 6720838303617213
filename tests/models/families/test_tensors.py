"""Pieces: any box out of any layout is what slicing the whole gives, and what is written is what was read."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from framework.core.records import whole
from framework.models.families.tensors import Entry, Stack, joined, pieces

QKV = ("layers.{}.q", "layers.{}.k", "layers.{}.v")


class Stored:
    """A tensor as safetensors gives it: by slices."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __getitem__(self, place: Any) -> Tensor:
        return self.tensor[place]


def test_q_k_v_by_head_by_hand() -> None:
    """Two heads of size 2, their rows q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1; the same for the biases."""
    shapes = {f"layers.0.{x}.{leaf}": (4, 3)[: 2 - (leaf == "bias")] for x in "qkv" for leaf in ("weight", "bias")}
    found = pieces([Entry("h.{}.qkv", QKV, by_head=True)], shapes, heads=2)
    assert found["layers.0.k.bias"].shape == (12,)
    assert list(found["layers.0.k.bias"].runs(0, 4)) == [(2, 2), (8, 2)]
    assert list(found["layers.0.v.weight"].runs(1, 2)) == [(5, 1), (10, 1)]
    rows = torch.arange(12.0)
    assert found["layers.0.k.bias"].read(Stored(rows), ((1, 3),)).tolist() == [3, 8, 9]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans(), st.booleans())
def test_any_box_of_any_layout_and_back(data: st.DataObject, transposed: bool, by_head: bool) -> None:
    heads, size, columns = (data.draw(st.integers(1, 4)) for _ in range(3))
    kv = heads if by_head else data.draw(st.integers(1, 4))
    rows = {"q": heads * size, "k": kv * size, "v": kv * size}
    ours = {f"layers.3.{x}.weight": torch.randn(n, columns) for x, n in rows.items()}
    table = [Entry("their.{}.c", QKV, transposed=transposed, by_head=by_head)]
    found = pieces(table, {name: tuple(x.shape) for name, x in ours.items()}, heads)
    ((name, theirs),) = joined(ours.items(), found.__getitem__)
    assert name == "their.3.c.weight"
    parts = [x.unflatten(0, (heads, -1)) if by_head else x.unsqueeze(0) for x in ours.values()]
    expected = torch.cat(parts, 1).flatten(0, 1)  # an independent way there
    assert torch.equal(theirs, expected.mT if transposed else expected)
    for key, tensor in ours.items():
        assert torch.equal(found[key].read(Stored(theirs), whole(tensor.shape)), tensor)
        box = tuple(
            (start := data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n - start))) for n in tensor.shape
        )
        (a, rows_), (b, columns_) = box
        assert torch.equal(found[key].read(Stored(theirs), box), tensor[a : a + rows_, b : b + columns_])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_box_of_a_stack_of_experts_and_back(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 4)) for _ in range(3))
    name, ours = "layers.7.mlp.experts.up.weight", torch.randn(shape)
    table = [Entry("h.{}.experts.{}.w1", ("layers.{}.mlp.experts.up",))]
    place = pieces(table, {name: shape}, heads=1)[name]
    assert isinstance(place, Stack)
    theirs = dict(joined([(name, ours)], lambda _: place))
    assert list(theirs) == [f"h.7.experts.{number}.w1.weight" for number in range(shape[0])]
    for number, tensor in enumerate(theirs.values()):
        assert torch.equal(tensor, ours[number])
    box = tuple((start := data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n - start))) for n in shape)
    opened = []

    def find(their: str) -> Stored:
        opened.append(their)
        return Stored(theirs[their])

    assert torch.equal(place.read(find, box), ours[tuple(slice(start, start + length) for start, length in box)])
    assert len(opened) == box[0][1]  # no other file is touched


def test_a_parameter_without_a_place_and_a_tensor_not_whole() -> None:
    with pytest.raises(KeyError):
        pieces([Entry("a", ("b",))], {"c.weight": (1, 1)}, heads=1)
    shapes = {f"layers.0.{x}.weight": (2, 2) for x in "qkv"}
    found = pieces([Entry("h.{}.qkv", QKV)], shapes, heads=1)
    with pytest.raises(ValueError, match=r"parts of h\.0\.qkv\.weight were not given"):
        list(joined([("layers.0.q.weight", torch.ones(2, 2))], found.__getitem__))
