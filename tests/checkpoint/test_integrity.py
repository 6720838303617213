"""The tensor hash against its formula in Python integers, hand-worked numbers, and the laws it must keep."""

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from framework.checkpoint import integrity
from framework.checkpoint.integrity import MODULUS, file_sha256, tensor_hash, tensor_hashes
from framework.core.records import whole

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # 8 bytes are two halves


def odd_mix(index: int) -> int:
    """The factor of one element, in unbounded integers; shifts are those of signed 64-bit numbers."""

    def signed(x: int) -> int:
        return x - MODULUS if x >= MODULUS // 2 else x

    x = (index + 1) * 0x9E3779B97F4A7C15 % MODULUS
    x = ((x ^ (signed(x) >> 32)) * 0xBF58476D1CE4E5B9) % MODULUS
    return ((x ^ (signed(x) >> 29)) % MODULUS) | 1


def by_the_formula(tensor: Tensor) -> int:
    bits = tensor.reshape(-1).view(_VIEWS[tensor.element_size()]).tolist()
    return sum(odd_mix(i) * b for i, b in enumerate(bits)) % MODULUS


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hash_is_its_formula_for_every_dtype(dtype: torch.dtype) -> None:
    assert tensor_hash(drawn(dtype, 3, 5, 7)) == by_the_formula(drawn(dtype, 3, 5, 7))


def test_hashes_taken_together_are_those_taken_one_by_one() -> None:
    dtypes = (torch.float32, torch.int32)
    tensors = [drawn(dtype, 3, 700, 70).transpose(1, 2) + n for n, dtype in enumerate(dtypes)]
    box, shape = ((1, 3), (0, 70), (4, 700)), (9, 70, 900)
    assert tensor_hashes(tensors, box, shape) == [tensor_hash(tensor, box, shape) for tensor in tensors]
    assert len(set(tensor_hashes(tensors, box, shape))) == 2


def test_hand_worked_numbers() -> None:
    assert tensor_hash(torch.tensor(1, dtype=torch.int32)) == odd_mix(0)
    assert tensor_hash(torch.tensor([0, 0, 2], dtype=torch.int16)) == 2 * odd_mix(2) % MODULUS
    assert tensor_hash(torch.tensor([0, 5 + (3 << 32)])) == (5 * odd_mix(2) + 3 * odd_mix(3)) % MODULUS
    assert tensor_hash(torch.tensor([1.0])) == 0x3F800000 * odd_mix(0) % MODULUS
    assert tensor_hash(torch.tensor([], dtype=torch.float32)) == 0
    assert tensor_hash(torch.tensor([-1], dtype=torch.int8)) == -odd_mix(0) % MODULUS


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_hashes_of_disjoint_boxes_add_up(shape: list[int], data: st.DataObject) -> None:
    """Any grid of cuts, in any dimensions: column shards, row shards, single elements."""
    tensor = drawn(torch.float32, *shape)
    cuts = [data.draw(st.lists(st.integers(0, size), max_size=2).map(sorted)) for size in shape]
    edges = [[0, *cut, size] for cut, size in zip(cuts, shape)]
    total = 0
    for box in itertools.product(*([(a, b - a) for a, b in itertools.pairwise(e)] for e in edges)):
        total += tensor_hash(tensor[tuple(slice(o, o + n) for o, n in box)], box, shape)
    assert total % MODULUS == tensor_hash(tensor)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = drawn(torch.float32, 40, 33)
    expected = tensor_hash(tensor)
    for chunk in (1, 7, 33, 66, 100, 10_000):
        monkeypatch.setattr(integrity, "_CHUNK", chunk)
        assert tensor_hash(tensor) == expected
        halves = [tensor_hash(tensor[:, a:b], ((0, 40), (a, b - a)), (40, 33)) for a, b in ((0, 9), (9, 33))]
        assert sum(halves) % MODULUS == expected


def test_real_chunks_are_crossed() -> None:
    tensor = torch.arange(3 * (integrity._CHUNK + 5)).reshape(3, -1)
    rows = [tensor_hash(tensor[i : i + 1], ((i, 1), (0, tensor.shape[1])), tensor.shape) for i in range(3)]
    assert sum(rows) % MODULUS == tensor_hash(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_every_single_flipped_bit_shows(dtype: torch.dtype) -> None:
    tensor = drawn(dtype, 4, 3)
    for byte in range(12 * tensor.element_size()):
        for bit in range(8):
            raw = tensor.clone().reshape(-1).view(torch.uint8)
            raw[byte] ^= 1 << bit
            assert tensor_hash(raw.view(dtype).reshape(4, 3)) != tensor_hash(tensor), (byte, bit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_negated_tensor_does_not_look_the_same(dtype: torch.dtype) -> None:
    """All signs flipped: an even number of changes that would cancel in float64, were it hashed in one piece."""
    tensor = drawn(dtype, 4, 4)
    assert tensor_hash(-tensor) != tensor_hash(tensor)


def test_swapped_and_moved_elements_show() -> None:
    tensor = drawn(torch.float32, 6, 8)
    assert tensor_hash(tensor.flip(0)) != tensor_hash(tensor)
    assert tensor_hash(tensor.t()) != tensor_hash(tensor)
    assert tensor_hash(torch.cat([torch.zeros(1, 8), tensor])[:6]) != tensor_hash(tensor)


def test_strides_do_not_show_and_the_sign_of_zero_does() -> None:
    tensor = drawn(torch.float32, 6, 8)
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous())
    assert tensor_hash(tensor[::2]) == tensor_hash(tensor[::2].clone())
    assert tensor_hash(torch.tensor([0.0])) != tensor_hash(torch.tensor([-0.0]))


def test_gradients_and_inputs_are_left_alone() -> None:
    tensor = torch.randn(5, requires_grad=True)
    before = tensor.detach().clone()
    tensor_hash(tensor)
    assert torch.equal(tensor.detach(), before)


def test_a_box_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) cannot fill the box"):
        tensor_hash(torch.zeros(2, 3), ((0, 3), (0, 3)), (6, 3))


def test_whole_is_the_default_box() -> None:
    tensor = drawn(torch.float32, 2, 3)
    assert tensor_hash(tensor) == tensor_hash(tensor, whole((2, 3)), (2, 3))


def test_sha256_is_hashlibs(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_finds_the_same_hash(dtype: torch.dtype) -> None:
    tensor = drawn(dtype, 300, 700)
    assert tensor_hash(tensor.cuda()) == tensor_hash(tensor)
    assert tensor_hash(tensor[:, 5:9].cuda(), ((0, 300), (5, 4)), (300, 700)) == tensor_hash(
        tensor[:, 5:9], ((0, 300), (5, 4)), (300, 700)
    )
