"""Stored boxes read back as any other boxes; the safetensors library as the judge of the files."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from framework.checkpoint.format import PartReader, Shards, merge, read_indices, write_part
from framework.checkpoint.integrity import file_sha256, tensor_hash
from framework.core.errors import CheckpointError
from framework.core.records import Box, whole


def cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in box)]


def grid(shape: tuple[int, ...], data: st.DataObject) -> list[Box]:
    """The whole shape, halved a few times along drawn dimensions."""
    boxes: list[Box] = [whole(shape)]
    for _ in range(data.draw(st.integers(0, 5))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        d = data.draw(st.integers(0, len(shape) - 1))
        offset, length = box[d]
        at = data.draw(st.integers(0, length))
        boxes += [(*box[:d], (offset, at), *box[d + 1 :]), (*box[:d], (offset + at, length - at), *box[d + 1 :])]
    return boxes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), st.data())
def test_any_box_comes_back_from_any_stored_boxes(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("part")
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    ranks = data.draw(st.integers(1, 3))
    held: list[Shards] = [[] for _ in range(ranks)]
    for box in grid(shape, data):
        held[data.draw(st.integers(0, ranks - 1))].append(("w", box, cut(tensor, box)))  # type: ignore[attr-defined]
    for rank in range(ranks):
        write_part(folder, "model", rank, held[rank], ranks)
    reader = PartReader(folder, "model")
    assert reader.shape("w") == shape
    for box in grid(shape, data):
        assert torch.equal(reader("w", box), cut(tensor, box))
    entry = merge(folder, "model", read_indices(folder))["w"]
    assert (entry.shape, entry.dtype) == (shape, "I64")
    assert int(entry.hash, 16) == tensor_hash(tensor)


def example(folder: Path) -> dict[str, Tensor]:
    tensors = {
        "model/a.weight": torch.randn(5, 7),
        "model/b": torch.randn(3).bfloat16(),
        "model/c": torch.randn(2, 2, 2, dtype=torch.float64),
        "optim/step": torch.tensor(3),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    write_part(folder, "model", 0, [(name, whole(t.shape), t) for name, t in tensors.items()])
    return tensors


def test_the_file_is_safetensors_and_bits_come_back(tmp_path: Path) -> None:
    tensors = example(tmp_path)
    by_library = load_file(tmp_path / "model-00000.safetensors")
    reader = PartReader(tmp_path, "model")
    assert reader.names == sorted(tensors)
    for number, (name, tensor) in enumerate(tensors.items()):
        assert torch.equal(by_library[f"{number}:{name}"], tensor)
        assert by_library[f"{number}:{name}"].dtype == tensor.dtype
        back = reader(name, whole(tensor.shape))
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)


def test_the_index_says_size_and_sha256_of_the_file(tmp_path: Path) -> None:
    example(tmp_path)
    index = json.loads((tmp_path / "model-00000.json").read_text())
    file = tmp_path / "model-00000.safetensors"
    assert (index["bytes"], index["sha256"]) == (file.stat().st_size, file_sha256(file))


def test_views_strided_and_shared_tensors_are_stored_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    items = [("t", whole((6, 4)), base.t()), ("s", whole((2, 6)), base[::2]), ("same", whole((4, 6)), base)]
    write_part(tmp_path, "model", 0, [*items, ("grad", whole((4, 6)), base.clone().requires_grad_())])
    reader = PartReader(tmp_path, "model")
    assert torch.equal(reader("t", whole((6, 4))), base.t())
    assert torch.equal(reader("s", whole((2, 6))), base[::2])
    assert torch.equal(reader("grad", whole((4, 6))), base)
    assert not reader("grad", whole((4, 6))).requires_grad


def test_a_flat_range_of_a_matrix_is_a_few_boxes(tmp_path: Path) -> None:
    """ZeRO cuts elements 5..13 of a [4, 5] matrix for rank 1: the end of row 1, row 2's beginning, nothing square."""
    tensor = torch.arange(20.0).reshape(4, 5)
    ranks: list[list[Box]] = [
        [((0, 1), (0, 5))],
        [((1, 1), (0, 5)), ((2, 1), (0, 3))],
        [((2, 1), (3, 2)), ((3, 1), (0, 5))],
    ]
    for rank, boxes in enumerate(ranks):
        write_part(tmp_path, "optim", rank, [("w", box, cut(tensor, box)) for box in boxes], 3)
    assert torch.equal(PartReader(tmp_path, "optim")("w", whole((4, 5))), tensor)
    assert int(merge(tmp_path, "optim", read_indices(tmp_path))["w"].hash, 16) == tensor_hash(tensor)


def test_parts_stand_side_by_side(tmp_path: Path) -> None:
    write_part(tmp_path, "actor", 0, [("w", whole((2,)), torch.ones(2))])
    write_part(tmp_path, "critic", 0, [("w", whole((2,)), torch.zeros(2))])
    assert PartReader(tmp_path, "actor")("w", whole((2,))).tolist() == [1, 1]
    assert PartReader(tmp_path, "critic")("w", whole((2,))).tolist() == [0, 0]
    with pytest.raises(CheckpointError, match="has no part 'acto': did you mean 'actor'"):
        PartReader(tmp_path, "acto")("w", whole((2,)))


def test_a_rank_that_holds_nothing_is_fine(tmp_path: Path) -> None:
    write_part(tmp_path, "model", 0, [("w", whole((2,)), torch.ones(2))], 2)
    write_part(tmp_path, "model", 1, [("w", ((2, 0),), torch.ones(0))], 2)
    assert PartReader(tmp_path, "model").shape("w") == (2,)


def test_unknown_names_and_boxes_are_refused(tmp_path: Path) -> None:
    example(tmp_path)
    reader = PartReader(tmp_path, "model")
    with pytest.raises(CheckpointError, match=r"no tensor 'model/a.wight': did you mean 'model/a.weight'"):
        reader("model/a.wight", whole((5, 7)))
    for box in (((0, 6), (0, 7)), ((-1, 2), (0, 7)), ((0, 5),)):
        with pytest.raises(CheckpointError, match=r"has shape \(5, 7\)"):
            reader("model/a.weight", box)


def test_a_missing_rank_a_hole_an_overlap_and_two_dtypes_are_refused(tmp_path: Path) -> None:
    def written(name: str, *ranks: Shards, world_size: int = 2) -> Path:
        (tmp_path / name).mkdir()
        for rank, shards in enumerate(ranks):
            write_part(tmp_path / name, "model", rank, shards, world_size)
        return tmp_path / name

    upper, lower = ("w", ((0, 2), (0, 3)), torch.ones(2, 3)), ("w", ((2, 2), (0, 3)), torch.ones(2, 3))
    with pytest.raises(CheckpointError, match=r"model-00001.json is missing \(rank 1 of model\)"):
        read_indices(written("missing", [upper]))
    for name, ranks, text in [
        ("hole", [[upper], [("w", ((3, 1), (0, 3)), torch.ones(1, 3))]], "hold 9 of 12"),
        ("overlap", [[upper, lower], [lower]], "hold 18 of 12"),
        ("dtypes", [[upper], [("w", lower[1], lower[2].double())]], "disagree about the dtype of 'w': F32, F64"),
    ]:
        folder = written(name, *ranks)
        with pytest.raises(CheckpointError, match=text):
            merge(folder, "model", read_indices(folder))


def test_a_torn_index_and_a_torn_file_are_named(tmp_path: Path) -> None:
    example(tmp_path)
    data, index = tmp_path / "model-00000.safetensors", tmp_path / "model-00000.json"
    data.write_bytes(data.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"cannot read .*model-00000.safetensors"):
        PartReader(tmp_path, "model")("mask", whole((3,)))
    index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"cannot read .*model-00000.json"):
        PartReader(tmp_path, "model")("mask", whole((3,)))
