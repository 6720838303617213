"""What is believed: every way in which a checkpoint can be spoiled is tried on a real one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.checkpoint.manifest import MANIFEST, Checkpoint
from tests.checkpoint.cases import folders, holds, saved


def spoil_flipped_byte(folder: Path) -> str:
    path = folder / "model-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)
    return "model-00000.safetensors was altered"


def spoil_missing_shard(folder: Path) -> str:
    (folder / "model-00000.safetensors").unlink()
    return "model-00000.safetensors is missing"


def spoil_short_shard(folder: Path) -> str:
    path = folder / "model-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "bytes, the manifest says"


def spoil_index(folder: Path) -> str:
    path = folder / "model-00000.json"
    path.write_text(path.read_text().replace('"name": "model/w"', '"name": "model/v"'))
    return "model-00000.json was altered"


def spoil_cut_manifest(folder: Path) -> str:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:200])
    return "manifest.json is cut short"


def spoil_empty_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_bytes(b"")
    return "manifest.json is cut short"


def spoil_edited_manifest(folder: Path) -> str:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"step": 3', '"step": 8'))
    return "manifest.json was altered"


def spoil_reformatted_manifest(folder: Path) -> str:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))
    return "manifest.json was altered"


def spoil_other_json(folder: Path) -> str:
    (folder / MANIFEST).write_text("[1, 2]")
    return "manifest.json was altered"


def spoil_absent_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return "manifest.json cannot be read: No such file"


SPOILERS = [value for name, value in list(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__.removeprefix("spoil_"))
def test_a_spoiled_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], str]
) -> None:
    manager = saved(tmp_path, 2, 3)
    expected = spoil(tmp_path / "step_00000003")
    assert holds(manager.latest(), 2)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith("warning: checkpoint step_00000003 is not used: ")
    assert expected in warning


def test_every_flipped_byte_of_a_manifest_is_detected(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    folder = tmp_path / "step_00000001"
    raw = (folder / MANIFEST).read_bytes()
    for at in range(len(raw)):
        (folder / MANIFEST).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert Checkpoint(folder).problems(), at
    (folder / MANIFEST).write_bytes(raw)
    assert Checkpoint(folder).problems() == []


def test_when_all_are_spoiled_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manager = saved(tmp_path, 2, 3)
    spoil_flipped_byte(tmp_path / "step_00000002")
    spoil_missing_shard(tmp_path / "step_00000003")
    assert manager.latest() is None
    assert capsys.readouterr().err.count("\n") == 2


def test_a_spoiled_one_does_not_outlive_the_course_that_replaced_it(tmp_path: Path) -> None:
    manager = saved(tmp_path, 2, 5)
    spoil_flipped_byte(tmp_path / "step_00000005")
    assert holds(manager.latest(), 2)
    saved(tmp_path, 3)
    assert folders(tmp_path) == ["step_00000002", "step_00000003"]
    assert holds(manager.latest(), 3)


def test_a_spoiled_one_can_be_saved_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manager = saved(tmp_path, 2, 3)
    spoil_cut_manifest(tmp_path / "step_00000003")
    saved(tmp_path, 3)
    assert holds(manager.latest(), 3)
    assert not capsys.readouterr().err
