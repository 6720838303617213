"""Rotary tables: angles by hand, precision far out, scores that depend on distances alone; scalings; linear biases."""

import math
from typing import Any

import pytest
import torch
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from cuda_ext.rotary.op import rotary
from framework.models.config import ModelConfig, RopeScaling, Scaling
from framework.models.positions import Alibi, Sinusoids, alibi_slopes, frequencies, rotary_tables, turn


def rope(size: int, theta: float = 1e4, **more: Any) -> ModelConfig:
    return ModelConfig(head_dim=size, rope_theta=theta, **more)


def test_angles_by_hand() -> None:
    """H=4, theta=100: frequencies 1 and 100^(-1/2) = 0.1, both halves alike."""
    cos, sin = rotary_tables(torch.tensor([[0, 3]]), rope(4, 100.0), torch.float64)
    angles = torch.tensor([[[0.0, 0, 0, 0], [3.0, 0.3, 3.0, 0.3]]], dtype=torch.float64)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_fp32_tables_are_right_far_out() -> None:
    """At position 1,000,000 an angle in fp32 would be off by 0.03."""
    cos, _ = rotary_tables(torch.tensor([[1_000_000]]), rope(64), torch.bfloat16)
    assert cos.dtype == torch.float32
    expected = math.cos(1_000_000 * 10000.0 ** (-2 / 64))
    assert abs(float(cos[0, 0, 1]) - expected) < 1e-6


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(at: int, of: int) -> float:
        turned = [rotary(x, *rotary_tables(torch.tensor([[p]]), rope(16), x.dtype)) for x, p in ((q, at), (k, of))]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(5, 2) - score(105, 102)) < 1e-12
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_a_part_of_each_head_turns_and_pairs_may_stand_side_by_side() -> None:
    """H=6, the first 4 turn, pairs (0,1) and (2,3), theta=100, position 2: angles 2 and 0.2."""
    config = rope(6, 100.0, rope_fraction=2 / 3, rope_interleaved=True)
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 1, 1, 6)
    tables = rotary_tables(torch.tensor([[2]]), config, x.dtype)
    (a, b), (c, d) = (
        (p * math.cos(angle) - q * math.sin(angle), q * math.cos(angle) + p * math.sin(angle))
        for (p, q), angle in (((1, 2), 2.0), ((3, 4), 0.2))
    )
    expected = torch.tensor([a, c, b, d, 5, 6], dtype=torch.float64)
    torch.testing.assert_close(turn(x, tables, interleaved=True).flatten(), expected)


def test_scaled_frequencies_by_hand() -> None:
    """R=8, theta=10^4: frequencies 1, 0.1, 0.01, 0.001. In an original context of 2000 pi they turn 1000, 100, 10 and 1
    times."""
    plain = torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    near = {"rtol": 1e-3, "atol": 0.0}  # 6283 for 2000 pi
    original: dict[str, Any] = {"factor": 4.0, "original_positions": 6283}
    linear = rope(8, rope_scaling=RopeScaling(Scaling.LINEAR, 4.0))
    torch.testing.assert_close(frequencies(linear), plain / 4)
    llama3 = rope(8, rope_scaling=RopeScaling(Scaling.LLAMA3, **original, slow=5.0, fast=15.0))
    # the third turns 10 times: half of it stays, half is divided by 4
    torch.testing.assert_close(frequencies(llama3), plain * torch.tensor([1, 1, 0.5 + 0.125, 0.25]), **near)
    yarn = rope(8, rope_scaling=RopeScaling(Scaling.YARN, **original, slow=1.5, fast=500.0))
    # 500 turns are at index 0.3 -> 0, 1.5 turns at 2.8 -> 3: index 1 keeps 2/3, index 2 keeps 1/3
    kept = torch.tensor([1, 2 / 3, 1 / 3, 0], dtype=torch.float64)
    torch.testing.assert_close(frequencies(yarn), plain * (kept + (1 - kept) / 4))
    cos, _ = rotary_tables(torch.tensor([[0]]), yarn, torch.float64)
    torch.testing.assert_close(cos, torch.full_like(cos, 1 + math.log(4) / 10))


def test_a_base_that_grows_with_the_document_by_hand() -> None:
    """R=4, theta=100, factor 3 over an original context of 10: at length 20 theta' = 100 (3 * 2 - 2)^2 = 1600."""
    config = rope(4, 100.0, rope_scaling=RopeScaling(Scaling.DYNAMIC, 3.0, 10))
    found = frequencies(config, lengths=torch.tensor([[1, 10, 20]]))
    torch.testing.assert_close(found, torch.tensor([[[1, 0.1], [1, 0.1], [1, 1 / 40]]], dtype=torch.float64))
    assert torch.equal(found[0, 1], frequencies(config))  # a document within its context turns as a cache does
    cos, _ = rotary_tables(torch.tensor([[2]]), config, torch.float64, lengths=torch.tensor([[20]]))
    torch.testing.assert_close(cos[0, 0, :2], torch.tensor([2.0, 0.05], dtype=torch.float64).cos())


def test_alibi_slopes_of_the_paper_and_biases_by_hand() -> None:
    assert alibi_slopes(8) == [2**-i for i in range(1, 9)]
    assert alibi_slopes(3) == pytest.approx([2**-4, 2**-8, 2**-2])
    seen = torch.tensor([[[[True, False], [True, True]]]])
    bias = Alibi(4, first=1, count=2)(seen, torch.tensor([[0, 1]]), torch.float32)
    ninf = float("-inf")
    expected = torch.tensor([[[[0, ninf], [-(2**-4), 0]], [[0, ninf], [-(2**-6), 0]]]])
    assert torch.equal(bias, expected)


def test_sinusoids_by_hand_and_by_transformers() -> None:
    """Of size 4: frequencies 1 and 1/100, sin in even places and cos in odd ones (Vaswani et al. 2017)."""
    table = Sinusoids(4)(torch.tensor([[0, 1, 7]]))[0]
    rows = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in (0, 1, 7)]
    torch.testing.assert_close(table, torch.tensor(rows, dtype=torch.float64))
    weight = MarianSinusoidalPositionalEmbedding(50, 16).create_weight()  # the sines first, then the cosines
    table = Sinusoids(16)(torch.arange(50).unsqueeze(0))[0]
    torch.testing.assert_close(torch.cat((table[:, ::2], table[:, 1::2]), 1).float(), weight, rtol=0, atol=1e-6)
