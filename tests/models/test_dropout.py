"""An adapter's dropout: by hand, its rate, what it depends on, and what it leaves alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.core import random
from framework.core.errors import UsageError
from framework.engine.dropping import Dropping
from framework.engine.micro_batches import MicroBatch
from framework.models.config import LoraConfig
from framework.models.dropout import Dropout, Moment, kept
from framework.models.layers import Linear
from framework.models.lora import LoraLinear
from tests.engine.lattice import pairs, pretraining

KEY = random.key(3, "dropout:layers.0.attention.q")


def masks(least: int, rows: list[int], step: int = 5, length: int = 6, size: int = 21, key: Any = KEY) -> Tensor:
    return kept(key, torch.tensor(step), torch.tensor(rows), length, size, least)


def test_an_element_has_sixteen_bits_of_one_draw() -> None:
    """Feature 13 = 8 + 2 x 2 + 1: the low half of the third word for cell 1."""
    words = random.philox(KEY, tuple(map(torch.tensor, (1, 4, 70_000, 5))))
    bits = int(words[2]) & 0xFFFF
    for least in (bits, bits + 1):
        assert bool(masks(least, [9, 70_000])[1, 4, 13]) == (least == bits)
    high = int(random.philox(KEY, tuple(map(torch.tensor, (2, 0, 9, 5))))[0]) >> 16
    assert [bool(masks(least, [9, 70_000])[0, 0, 16]) for least in (high, high + 1)] == [True, False]


def test_the_rate_and_what_it_depends_on() -> None:
    draws = [
        masks(19661, [0, 1], length=64, size=256),
        masks(19661, [2, 3], length=64, size=256),
        masks(19661, [0, 1], step=6, length=64, size=256),
        masks(19661, [0, 1], length=64, size=256, key=random.key(4, "dropout:layers.0.attention.q")),
    ]
    for draw in draws:  # 32768 elements, 0.7 of them kept: a deviation of 0.0025
        assert abs(float(draw.double().mean()) - 0.7) < 0.0125
    for other in draws[1:]:
        assert abs(float((draws[0] == other).double().mean()) - 0.58) < 0.0125
    assert torch.equal(masks(19661, [8, 1, 4])[1:2], masks(19661, [1]))
    assert torch.equal(masks(19661, [1])[:, :4, :9], masks(19661, [1], length=4, size=9))


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """x = (3, 4), W = (1, 2), A = (1, 1), B = (2), scale 0.5; half of the inputs drop and the first stays:
    3 + 8 + 0.5 x 2 x (3 x 2 + 0) = 17; the gradients of A and of x are 0.5 x 2 x (6, 0) and (1, 2) + (2, 0)."""
    monkeypatch.setattr("framework.models.dropout.kept", lambda *_: torch.tensor([[[True, False]]]))
    base = Linear(2, 1, bias=False)
    layer = LoraLinear(base, 1, 0.5, Dropout(0.5, 0, "", Moment())).to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_a.copy_(torch.tensor([[1.0, 1.0]]))
        layer.lora_b.fill_(2.0)
    x = torch.tensor([[[3.0, 4.0]]], requires_grad=True)
    y = layer.train()(x)
    y.sum().backward()
    assert y.tolist() == [[[17]]]
    assert layer.lora_a.grad.tolist() == [[6, 0]]  # type: ignore[union-attr]
    assert x.grad.tolist() == [[[3, 2]]]  # type: ignore[union-attr]
    assert layer.eval()(x).item() == 3 + 8 + 0.5 * 2 * 7


def test_rows_are_numbered_over_micro_batches_and_sides_of_a_pair() -> None:
    dropout = Dropout(0.1, 0, "q", Moment())
    seen: list[tuple[int, list[int]]] = []

    def loss_of(score: Any, micro: MicroBatch) -> None:
        seen.append((int(dropout.moment.step), dropout.moment.rows.tolist()))

    dropping = Dropping.of([torch.nn.ModuleList([dropout])], 2, torch.device("cpu"))
    assert dropping is not None
    told = dropping.around(loss_of, step=3, first=4)
    for rows in (pretraining(0), pretraining(0), pairs(0)):
        told(None, MicroBatch(rows, 2))
    assert seen == [(3, [4, 5]), (3, [6, 7]), (3, [16, 18, 17, 19])]
    assert Dropping.of([Linear(2, 2, False)], 2, torch.device("cpu")) is None


def test_a_rate_that_is_none_is_refused() -> None:
    for rate in (-0.1, 1.0):
        with pytest.raises(UsageError, match=rf"lora\.dropout={rate} must be in \[0, 1\)"):
            replace(LoraConfig(rank=2), dropout=rate)
