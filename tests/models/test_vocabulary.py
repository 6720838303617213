"""New rows by hand; old rows bit for bit; what cannot be filled is refused."""

import pytest
import torch

from framework.core.errors import UsageError
from framework.models.vocabulary import resized

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.25]])


def test_by_hand() -> None:
    """Row 3 is the mean of rows 0 and 1, row 4 that of 2, 2 and 0: (0.5 + 0.5 + 1) / 3 and (0.25 + 0.25 + 2) / 3."""
    grown = resized(WEIGHT, {3: (0, 1), 4: (2, 2, 0)})
    assert torch.equal(grown[:3], WEIGHT)
    assert grown[3].tolist() == [2.0, -1.0]
    assert torch.allclose(grown[4], torch.tensor([2 / 3, 2.5 / 3]), rtol=1e-6)
    assert resized(torch.tensor([1.0, 3.0]), {2: (0, 1)}).tolist() == [1.0, 3.0, 2.0]


def test_the_mean_is_taken_in_fp32_and_the_dtype_kept() -> None:
    """In bf16 256 + 1 is 256, and so is 256 + 1 + 1; its third would be 85.5. In fp32 the mean is 86."""
    grown = resized(torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16), {2: (0, 1, 1)})
    assert grown.dtype is torch.bfloat16
    assert grown[2].item() == 86.0
    assert resized(WEIGHT.double(), {3: (0,)}).dtype is torch.float64


def test_a_padded_row_is_drawn_and_others_stay() -> None:
    padded = torch.cat([WEIGHT, torch.full((2, 2), 9.0)])
    grown = resized(padded, {3: (0, 1)})
    assert grown.tolist() == [*WEIGHT.tolist(), [2.0, -1.0], [9.0, 9.0]]
    assert padded[3].tolist() == [9.0, 9.0], "the argument is left alone"
    assert torch.equal(resized(WEIGHT, {}), WEIGHT)


def test_gaps_and_pieces_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="id 3 is neither one of the 3 old rows nor has it sub-pieces"):
        resized(WEIGHT, {4: (0,)})
    with pytest.raises(UsageError, match=r"id 3: its sub-pieces \[0, 3\] must be some of the 3 old rows"):
        resized(WEIGHT, {3: (0, 3)})
    with pytest.raises(UsageError, match=r"its sub-pieces \[\] must be"):
        resized(WEIGHT, {3: ()})
