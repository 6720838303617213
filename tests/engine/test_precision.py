"""Masters stand aside while a pass computes in another dtype, get its gradients, and come back whatever happens."""

import pytest
import torch
from torch import nn

from framework.engine.precision import computing_in


def test_gradients_arrive_at_the_fp32_masters_even_of_several_backwards() -> None:
    linear = nn.Linear(3, 2)
    master = linear.weight
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    with computing_in(torch.bfloat16, linear):
        assert linear.weight.dtype == torch.bfloat16
        for _ in range(2):
            y = linear(x)
            assert y.dtype == torch.bfloat16
            y.sum().backward()
    assert linear.weight is master
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert master.grad.tolist() == [[2.0, 4.0, 6.0]] * 2


def test_masters_come_back_after_an_error() -> None:
    linear = nn.Linear(3, 2)
    before = dict(linear.named_parameters())
    with pytest.raises(ValueError, match="inside"), computing_in(torch.bfloat16, linear):
        raise ValueError("inside")
    assert all(parameter is before[name] for name, parameter in linear.named_parameters())


def test_equal_dtypes_change_nothing() -> None:
    linear = nn.Linear(3, 2)
    before = linear.weight
    with computing_in(torch.float32, linear):
        assert linear.weight is before
