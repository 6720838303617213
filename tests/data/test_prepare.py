"""Preparing once: killed at any instant and resumed to the same bytes, by several at once, damaged, on a full disk."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framework.core.errors import DataError, FrameworkError
from framework.core.records import Sample, TextSample, Tokenizer
from framework.data import prepare as room
from framework.data.config import DataConfig
from framework.data.prepare import Preparation, Prepared, Skip, prepare
from framework.data.pretrain import open_rows, render_documents
from framework.data.rows import pack
from framework.data.shards import Shards
from framework.stages.extensions import load_extensions
from tests.data.conftest import Write

WORDS = ["the", "cat", "sat", "on", "a", "mat", "", "a very long line of text about a cat"]
Start = Callable[[Preparation, Path], Any]


@pytest.fixture
def source(write: Write) -> str:
    """1,200 short texts, one in eight of them empty: five batches."""
    return write("a.jsonl", [{"text": " ".join([WORDS[n % 8]] * (n % 3 + 1)).strip()} for n in range(1200)])


def preparation(tokenizer: Tokenizer, *paths: str, **changes: Any) -> Preparation:
    settings: dict[str, Any] = {
        "kind": "pretrain",
        "paths": paths,
        "format": "auto",
        "part": "train",
        "valid_share": 0.0,
        "max_tokens": 16,
        "packing": True,
        "tokenizer": tokenizer,
        "render": lambda samples: render_documents(tokenizer, samples),
        "finish": pack(DataConfig(max_tokens=16)),
    }
    return Preparation(**(settings | changes))


def content(folder: Path) -> dict[str, bytes]:
    """The files of the one prepared folder under a cache; the journal says only where a run stopped last."""
    (prepared,) = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return {p.name: p.read_bytes() for p in prepared.iterdir() if p.name != "journal.json"}


def run(target: Callable[[], Any]) -> Any:
    """A real process; forked, so that it starts at once."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def die_at(call: int, owner: Any, name: str) -> None:
    """From now on, call number `call` of owner.name kills this process in the place of the call."""
    real, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


INSTANTS = [
    ("_write_journal", 1, room._Writer),  # nothing is on disk
    ("_append", 700, room._Writer),  # in the middle of a batch, after two journals
    ("_write_journal", 4, room._Writer),
    ("_write", 3, room),  # files synced, journal not
    ("finish", 1, room._Writer),
    ("_sync", 14, room),  # in the middle of the plan
    ("_sync", 17, room),  # the manifest is there under its provisional name
    ("rename", 1, Path),  # whole, without its name
]


@pytest.mark.parametrize(("name", "call", "owner"), INSTANTS, ids=[f"{n}-{c}" for n, c, _ in INSTANTS])
def test_killed_and_resumed_equals_undisturbed(
    tokenizer: Tokenizer, source: str, tmp_path: Path, name: str, call: int, owner: Any
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    prepare(preparation(tokenizer, source), undisturbed)

    def doomed() -> None:
        room.JOURNAL_EVERY_S = 0.0
        die_at(call, owner, name)
        prepare(preparation(tokenizer, source), killed)

    process = run(doomed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not [p for p in killed.iterdir() if not p.name.startswith(".")], "nothing half-written has a name"
    prepare(preparation(tokenizer, source), killed)
    assert content(killed) == content(undisturbed)


def test_killed_at_random_instants_again_and_again(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    prepare(preparation(tokenizer, source), undisturbed)
    rng, attempts = np.random.default_rng(0), 0

    def slow(samples: list[Sample]) -> list[Prepared | Skip]:
        time.sleep(0.01)
        return render_documents(tokenizer, samples)

    def work() -> None:
        room.JOURNAL_EVERY_S, room._BATCH = 0.0, 50
        prepare(preparation(tokenizer, source, render=slow), killed)

    while not [p for p in (killed.iterdir() if killed.exists() else ()) if not p.name.startswith(".")]:
        process = run(work)
        process.join(rng.uniform(0.02, 0.2) * (1 + attempts / 4))
        process.kill()
        process.join()
        attempts += 1
    assert attempts > 1, "the first attempt was never killed: the test shows nothing"
    assert content(killed) == content(undisturbed)


def test_resuming_goes_on_where_the_journal_ends(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    def doomed() -> None:
        room.JOURNAL_EVERY_S = 0.0
        die_at(4, room._Writer, "_write_journal")
        prepare(preparation(tokenizer, source), tmp_path / "cache")

    run(doomed).join(60)
    rendered: list[int] = []

    def render(samples: list[Sample]) -> list[Prepared | Skip]:
        rendered.append(len(samples))
        return render_documents(tokenizer, samples)

    prepare(preparation(tokenizer, source, render=render), tmp_path / "cache")
    assert sum(rendered) == 1200 - 3 * 256


@pytest.mark.parametrize("harm", ["shorter", "gone"])
def test_work_that_is_not_what_its_journal_says_is_done_again(
    tokenizer: Tokenizer, source: str, tmp_path: Path, harm: str
) -> None:
    cache = tmp_path / "cache"

    def doomed() -> None:
        room.JOURNAL_EVERY_S = 0.0
        die_at(3, room._Writer, "_write_journal")
        prepare(preparation(tokenizer, source), cache)

    run(doomed).join(60)
    (ids,) = cache.glob(".*.partial/ids.bin")
    ids.write_bytes(b"123") if harm == "shorter" else ids.unlink()
    prepare(preparation(tokenizer, source), cache)
    prepare(preparation(tokenizer, source), tmp_path / "undisturbed")
    assert content(cache) == content(tmp_path / "undisturbed")


def test_two_processes_at_once_work_once(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    diary = tmp_path / "diary"

    def render(samples: list[Sample]) -> list[Prepared | Skip]:
        with diary.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(0.02)
        return render_documents(tokenizer, samples)

    def work() -> None:
        assert len(prepare(preparation(tokenizer, source, render=render), tmp_path / "cache")) == 1050

    processes = [run(work) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    pids = diary.read_text().split()
    assert len(pids) == 5
    assert len(set(pids)) == 1


def test_the_name_is_the_content(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    """Another place for the same bytes changes nothing; whatever decides the rows changes the name."""
    copy = shutil.copy(source, tmp_path / "copy.jsonl")
    altered = tmp_path / "altered.jsonl"
    altered.write_bytes(Path(source).read_bytes().replace(b"mat", b"hat", 1))

    def name(*paths: str, **changes: Any) -> str:
        return prepare(preparation(tokenizer, *paths, **changes), tmp_path / "cache").folder.name

    assert name(str(copy)) == name(source)
    others = [
        name(str(altered)),
        name(source, source),
        name(source, max_tokens=15),
        name(source, packing=False),
        name(source, valid_share=0.5),
        name(source, valid_share=0.5, part="valid"),
        name(source, format="text"),
        name(source, kind="other"),
    ]
    assert len({*others, name(source)}) == len(others) + 1


def test_a_format_of_ones_own_is_known_by_its_code(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    """Its name says nothing: a student edits the function and runs the same command."""
    file, cache = tmp_path / "shouting.py", tmp_path / "cache"
    lengths = []
    for text in ("record['text']", "record['text'] * 2"):
        file.write_text(SHOUTING.format(text=text))
        load_extensions([str(file)])
        for _ in range(2):
            lengths.append(prepare(preparation(tokenizer, source, format="shouting"), cache).counted.num_bytes)
    load_extensions([])
    assert lengths == [lengths[0], lengths[0], 2 * lengths[0], 2 * lengths[0]]
    assert len([folder for folder in cache.iterdir() if not folder.name.startswith(".")]) == 2


SHOUTING = """
from framework import register
from framework.core.records import TextSample

@register("data_format", "shouting")
def shouting(record):
    return TextSample({text})
"""


def test_a_second_opening_reads_no_data(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    def never(samples: list[Sample]) -> list[Prepared | Skip]:
        raise AssertionError("prepared again")

    first = prepare(preparation(tokenizer, source), tmp_path / "cache")
    again = prepare(preparation(tokenizer, source, render=never), tmp_path / "cache")
    assert again.counted == first.counted
    assert again.counted.read == 1200
    assert again.counted.skipped == {"empty text": 150}


def test_progress_goes_from_the_first_byte_to_the_last(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(preparation(tokenizer, source, source), tmp_path / "cache", lambda done, total: seen.append((done, total)))
    size = Path(source).stat().st_size
    assert seen[-1] == (2 * size, 2 * size)
    assert seen == sorted(seen)
    assert len(seen) == 10


def test_a_damaged_folder_is_named(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    folder = prepare(preparation(tokenizer, source), tmp_path / "cache").folder
    whole = (folder / "ids.bin").read_bytes()
    (folder / "ids.bin").write_bytes(whole[:-2])
    message = f"ids.bin has {len(whole) - 2} bytes instead of {len(whole)}; delete {folder} and start again"
    with pytest.raises(FrameworkError, match=message):
        Shards(folder)
    (folder / "ids.bin").unlink()
    with pytest.raises(FrameworkError, match=r"ids\.bin is missing"):
        prepare(preparation(tokenizer, source), tmp_path / "cache")


def test_a_folder_without_a_manifest_is_not_taken(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    folder = prepare(preparation(tokenizer, source), tmp_path / "cache").folder
    before = content(tmp_path / "cache")
    (folder / "manifest.json").unlink()
    (folder / "ids.bin").write_bytes(b"")
    prepare(preparation(tokenizer, source), tmp_path / "cache")
    assert content(tmp_path / "cache") == before


def test_a_full_disk_is_one_line_and_loses_nothing(
    tokenizer: Tokenizer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(room._Writer, "_append", full)
        with pytest.raises(
            FrameworkError, match=r"cannot write prepared data to .*No space left on device; see data\.cache"
        ):
            prepare(preparation(tokenizer, source), cache)
    assert len(prepare(preparation(tokenizer, source), cache)) == 1050


def test_wrong_data_are_named_and_leave_nothing(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    records = [{"text": "ok"}] * 300
    cases = {
        r"a\.jsonl:301: malformed JSON": [*records, "{"],
        r"a\.jsonl:302: pretraining takes plain": [*records, "", {"text": "odd"}],
    }

    def render(samples: list[Sample]) -> list[Prepared | Skip]:
        if TextSample("odd") in samples:
            raise DataError("pretraining takes plain texts")
        return render_documents(tokenizer, samples)

    for message, lines in cases.items():
        with pytest.raises(DataError, match=message):
            prepare(preparation(tokenizer, write("a.jsonl", lines), render=render), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_share_is_held_out_by_content(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    texts = [f"text {n // 2}" for n in range(1000)]
    path = write("a.jsonl", [{"text": text} for text in texts])
    shuffled = write("b.jsonl", [{"text": text} for text in reversed(texts)])

    def part(path: str, name: str) -> list[str]:
        shards = prepare(preparation(tokenizer, path, part=name, valid_share=0.2), tmp_path / "cache")
        return [tokenizer.decode(shards.sequence(n)[0].tolist()) for n in range(len(shards))]

    train, valid = part(path, "train"), part(path, "valid")
    assert sorted(train + valid) == sorted(texts)
    assert not set(train) & set(valid)
    assert 0.15 < len(valid) / 1000 < 0.25
    assert part(shuffled, "valid") == valid[::-1]


def test_a_large_file_takes_little_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """6 MB of text, 6 million ids, through less than 16 MB; as lists the ids alone are more than 200."""
    line = json.dumps({"text": "the cat sat on a mat " * 500}) + "\n"
    with open(tmp_path / "a.jsonl", "w") as stream:
        stream.writelines([line] * (6_000_000 // len(line)))
    config = DataConfig(train=[str(tmp_path / "a.jsonl")], max_tokens=512)
    tracemalloc.start()
    rows = open_rows(config, "train", tokenizer, tmp_path / "cache", 0)
    rows.rows(np.arange(0, len(rows), 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.num_tokens > 5_950_000
    assert peak < 16 << 20
