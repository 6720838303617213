"""What benchmarks work on: a small Llama folder with a tokenizer of ours, and Tang verse, enlarged where it must be.

Nothing is downloaded.
"""

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import framework
from framework.core.config import recipes_folder
from framework.core.records import whole
from framework.models.config import ModelConfig
from framework.models.hub import save_weights
from framework.models.init import parameter_shapes, random_weights
from framework.tokenization.load import load

TANG = recipes_folder() / "corpora" / "tang"
# Weights far from small, so that a first loss says something: near zero it would be log V whatever the input.
INIT_STD = 0.1


def model_folder(place: Path, width: int, layers: int) -> Path:
    """A Llama of random weights with the quickstart's tokenizer, in the Hugging Face format."""
    words = ["experiment=quickstart/tokenizer", f"run.root={place}", "tracking.progress=false"]
    tokenizer = load(framework.run("tokenizer", words).folder / "model")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=width, num_layers=layers, num_heads=4, init_std=INIT_STD
    )
    read = random_weights(config, seed=0)
    weights = ((name, read(name, whole(shape))) for name, shape in parameter_shapes(config).items())
    extra = {"eos_token_id": tokenizer.end_id, "bos_token_id": tokenizer.bos_id}
    save_weights(config, weights, place / "model", extra=extra)
    tokenizer.save(str(place / "model"))
    return place / "model"


def conversations(limit: int = 0) -> list[dict[str, str]]:
    """Records of Tang verse to fine-tune on: {"instruction", "output"}."""
    lines = (TANG / "sft.train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: limit or None]]


def as_messages(records: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The same as OpenAI messages."""
    return [
        [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}] for r in records
    ]


def write_records(file: Path, records: Iterator[dict[str, str]] | list[dict[str, str]]) -> Path:
    """A .jsonl file of them, one a line."""
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return file


def long_conversations(kilobytes: int) -> Iterator[dict[str, str]]:
    """Conversations of 1 to 24 couplets each until there are so many kilobytes: no two samples are alike."""
    couplets = [record["instruction"] + record["output"] for record in conversations()]
    size = 0
    for at, number in enumerate(cycle(range(1, 25))):
        if size >= kilobytes * 1000:
            return
        chosen = [couplets[(at + n * 7919) % len(couplets)] for n in range(number)]
        middle = (number + 1) // 2
        record = {"instruction": f"{at}：" + "".join(chosen[:middle]), "output": "".join(chosen[middle:]) or chosen[0]}
        size += len(json.dumps(record, ensure_ascii=False).encode())
        yield record
