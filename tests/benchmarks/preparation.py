"""Tokens prepared a second on two cores, beside `datasets.map`: from a .jsonl file to rows on disk, ready to train.

One tokenizer, one chat template, the same ids and the same trained tokens. A lap is the whole file, nothing cached.
Ours hashes the file, renders, tokenizes, masks, packs and syncs to disk; `datasets` loads and maps in batches in two
processes and does not pack. Its map alone, on what was loaded before the clock started, stands beside.
"""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import framework
from framework.data import pretrain, sft
from framework.data.config import DataConfig
from framework.tokenization.load import load
from tests.benchmarks.contest import Laps, Run, compete, options, report
from tests.benchmarks.material import TANG, as_messages, long_conversations, write_records

OPEN_ROWS: dict[str, Any] = {"conversations": sft.open_rows, "texts": pretrain.open_rows}


@dataclasses.dataclass(frozen=True)
class Task:
    """The same for all."""

    tokenizer: Path
    file: Path
    kind: str  # "conversations" | "texts"
    cores: int
    max_tokens: int


def ours(place: Path, laps: Laps, task: Task) -> None:
    """What `framework sft` and `framework pretrain` do before they train."""
    tokenizer = load(task.tokenizer)
    data = DataConfig(train=[str(task.file)], max_tokens=task.max_tokens)

    def prepared() -> tuple[int, int]:
        rows = OPEN_ROWS[task.kind](data, "train", tokenizer, place / "prepared", 0)
        return rows.shards.counted.num_ids, rows.num_tokens

    _run(laps, prepared, lambda: shutil.rmtree(place / "prepared", ignore_errors=True))


def mapped(place: Path, laps: Laps, task: Task, load_too: bool) -> None:
    """`datasets.map` with the same tokenizer as transformers wraps it."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    turn = functools.partial({"conversations": chat, "texts": text}[task.kind], tokenizer)
    cache = place / "cache"

    def loaded() -> Any:
        return load_dataset("json", data_files=str(task.file), split="train", cache_dir=str(cache))

    before = None if load_too else loaded()

    def prepared() -> tuple[int, int]:
        dataset = loaded() if before is None else before
        done = dataset.map(turn, batched=True, num_proc=task.cores, remove_columns=dataset.column_names)
        return sum(done["num_ids"]), sum(done["num_trained"])

    def forget() -> None:
        if before is None:
            shutil.rmtree(cache, ignore_errors=True)
        else:
            before.cleanup_cache_files()

    _run(laps, prepared, forget)


def _run(laps: Laps, prepare: Callable[[], tuple[int, int]], forget: Callable[[], Any]) -> None:
    """Prepare once to say what comes out, then lap after lap."""
    ids, trained = prepare()
    forget()
    laps.ready({"ids": ids, "trained tokens": trained})
    while True:
        prepare()
        laps.done(trained, ids)
        forget()


def chat(tokenizer: Any, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Conversations by the chat template; what it marks as generated is trained."""
    records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    done = tokenizer.apply_chat_template(as_messages(records), return_dict=True, return_assistant_tokens_mask=True)
    ids, masks = done["input_ids"], done["assistant_masks"]
    return _columns(ids, masks, [sum(mask[1:]) for mask in masks])


def text(tokenizer: Any, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
    """Texts with the end token around them, all trained."""
    end = tokenizer.eos_token_id
    ids = [[end, *ids, end] for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]]
    return _columns(ids, [[1] * len(row) for row in ids], [len(row) - 1 for row in ids])


def _columns(ids: list[Any], masks: list[Any], trained: list[int]) -> dict[str, list[Any]]:
    return {"input_ids": ids, "mask": masks, "num_ids": [len(row) for row in ids], "num_trained": trained}


def contestants(task: Task) -> dict[str, Run]:
    """Ours first."""
    return {
        f"framework, {task.kind}": functools.partial(ours, task=task),
        "datasets: load and map": functools.partial(mapped, task=task, load_too=True),
        "datasets: map alone": functools.partial(mapped, task=task, load_too=False),
    }


def records(kind: str, kilobytes: int) -> Iterator[dict[str, str]]:
    """What the file holds."""
    made = long_conversations(kilobytes)
    return made if kind == "conversations" else ({"text": r["instruction"] + r["output"]} for r in made)


def main(argv: list[str] | None = None) -> None:
    """Run it, for conversations and for texts."""
    args = options(__doc__ or "", argv, rounds=5, kilobytes=10000, vocabulary=8000, cores=2, max_tokens=1024)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        words = [f"data.train=[{TANG}/train.txt]", f"tokenizer.vocab_size={args.vocabulary}", f"run.root={place}"]
        tokenizer = framework.run("tokenizer", words).folder / "model"
        for kind in OPEN_ROWS:
            (place / kind).mkdir()
            file = write_records(place / f"{kind}.jsonl", records(kind, args.kilobytes))
            task = Task(tokenizer, file, kind, args.cores, args.max_tokens)
            contest = compete(contestants(task), place / kind, args.rounds)
            facts = {
                "cores": args.cores,
                "megabytes": round(file.stat().st_size / 1e6, 1),
                "vocabulary": load(tokenizer).vocab_size,
            }
            report(f"Preparing {kind}", contest, facts, args.out)


if __name__ == "__main__":
    main()
