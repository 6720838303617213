"""Rotary tables: angles by hand, precision far out, scores that depend on distances alone."""

import math

import torch

from cuda_ext.rotary.op import rotary
from framework.models.positions import rotary_tables


def test_angles_by_hand() -> None:
    """H=4, theta=100: frequencies 1 and 100^(-1/2) = 0.1, both halves alike."""
    cos, sin = rotary_tables(torch.tensor([[0, 3]]), 4, 100.0, torch.float64)
    angles = torch.tensor([[[0.0, 0, 0, 0], [3.0, 0.3, 3.0, 0.3]]], dtype=torch.float64)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_fp32_tables_are_right_far_out() -> None:
    """At position 1,000,000 an angle in fp32 would be off by 0.03."""
    cos, _ = rotary_tables(torch.tensor([[1_000_000]]), 64, 10000.0, torch.bfloat16)
    assert cos.dtype == torch.float32
    expected = math.cos(1_000_000 * 10000.0 ** (-2 / 64))
    assert abs(float(cos[0, 0, 1]) - expected) < 1e-6


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(at: int, of: int) -> float:
        turned = [rotary(x, *rotary_tables(torch.tensor([[p]]), 16, 1e4, x.dtype)) for x, p in ((q, at), (k, of))]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(5, 2) - score(105, 102)) < 1e-12
    assert abs(score(5, 2) - score(5, 3)) > 1e-3
