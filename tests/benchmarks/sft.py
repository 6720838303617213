"""SFT tokens a second on a CPU, the whole training loop, beside the Hugging Face Trainer and TRL's SFTTrainer.

One model folder, the same conversations, the same tokens trained in an epoch, about as many samples a step; each lays
them out as it ships: ours packs rows, the Trainer pads to the longest of a batch or groups by length, TRL pads or
packs. fp32, one number of threads. Before training each says its loss on the same conversations, one number for all.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import framework
from framework.core.records import TokenBatch
from framework.core.registry import register
from framework.data.config import DataConfig
from framework.data.loader import Loader
from framework.data.sft import open_rows
from framework.tokenization.load import load
from tests.benchmarks.contest import Laps, Run, compete, options, report
from tests.benchmarks.material import as_messages, conversations, model_folder, write_records

LR, EPS, DECAY, CLIP, BETA2 = 1e-4, 1e-8, 0.1, 1.0, 0.999


@dataclasses.dataclass(frozen=True)
class Task:
    """The same for all. A lap is `steps` optimizer steps; a batch of ours is `rows` rows of `max_tokens`."""

    place: Path
    threads: int
    rounds: int
    steps: int
    rows: int
    max_tokens: int

    @property
    def model(self) -> Path:
        return self.place / "model"

    @property
    def total_steps(self) -> int:
        return self.steps * (self.rounds + 2)

    @property
    def samples_a_step(self) -> int:
        """In a batch of ours, on average: the batch of those who do not pack."""
        rows = our_rows(self)
        return max(1, round(rows.shards.counted.sequences / len(rows) * self.rows))

    def records(self, part: str) -> list[dict[str, str]]:
        lines = (self.place / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


# --- ours ----------------------------------------------------------------------------------------------------------


def ours(place: Path, laps: Laps, task: Task) -> None:
    """`framework sft`, which halts where it logs a step."""
    loader = Loader(our_rows(task), task.rows, seed=0)
    counts = [token_counts(loader.batch(step)) for step in range(task.total_steps)]

    @register("tracker", "laps")
    class Tracker:
        def __init__(self, *_: Any) -> None: ...

        def log(self, step: int, figures: Mapping[str, float]) -> None:
            if step == 0:
                laps.ready({"trained tokens an epoch": loader.rows.num_tokens}, {"first loss": figures["valid/loss"]})
                return
            laps.done(*map(sum, zip(*counts[step - task.steps : step], strict=True)))

        def finish(self, figures: Mapping[str, float]) -> None: ...

        def close(self) -> None: ...

    framework.run("sft", [*our_words(task), f"run.dir={place}", "tracking.kind=laps"])


def token_counts(batch: TokenBatch) -> tuple[int, int]:
    """(trained, read)"""
    return int(batch.loss_mask.sum()), int((batch.document_ids > 0).sum())


def our_words(task: Task) -> list[str]:
    """Model, data, batch, optimizer; all else as it ships, but for the logging: as often as the others."""
    return [
        f"init_from={task.model}", f"data.train=[{task.place}/train.jsonl]", f"data.valid=[{task.place}/held.jsonl]",
        f"data.cache={task.place}/prepared", f"data.max_tokens={task.max_tokens}", f"batch.size={task.rows}",
        "device=cpu", f"threads={task.threads}", f"train.steps={task.total_steps}", f"tracking.every={task.steps}",
        "optim.schedule=linear", "optim.warmup=0", "optim.final_lr=0", f"optim.lr={LR}", f"optim.eps={EPS}",
        f"optim.weight_decay={DECAY}", f"optim.clip={CLIP}", "optim.beta1=0.9", f"optim.beta2={BETA2}",
    ]  # fmt: skip


def our_rows(task: Task, part: str = "train") -> Any:
    """Rows of a file as ours packs them, prepared where they are not yet."""
    data = DataConfig(train=[f"{task.place}/{part}.jsonl"], max_tokens=task.max_tokens)
    return open_rows(data, "train", load(task.model), task.place / "prepared", seed=0)


# --- theirs --------------------------------------------------------------------------------------------------------


class Counting:
    """A collator that notes (trained, read) tokens of what goes through it: batch n is step n."""

    def __init__(self, inner: Any):
        self.inner, self.counts = inner, list[tuple[int, int]]()

    def __call__(self, features: list[Any]) -> Any:
        batch = self.inner(features)
        real = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        self.counts.append((int((batch["labels"][:, 1:] != -100).sum()), int(real)))
        return batch


def theirs(place: Path, laps: Laps, task: Task, build: Any, **changes: Any) -> None:
    """A trainer that halts at the end of every `task.steps` steps."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(task.threads)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    trainer = build(place, task, changes)
    loss = trainer.evaluate()["eval_loss"]
    trainer.data_collator = counting = Counting(trainer.data_collator)

    class Halt(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            epoch = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels[1:])
            laps.ready({"trained tokens an epoch": epoch}, {"first loss": loss})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if step % task.steps == 0:
                laps.done(*map(sum, zip(*counting.counts[step - task.steps : step], strict=True)))

    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Halt())
    trainer.train()


def arguments(place: Path, task: Task, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What both are told; all else as they ship, save TRL's gradient checkpointing, which would only slow it."""
    return {
        "output_dir": str(place), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "max_steps": task.total_steps, "logging_steps": task.steps, "dataloader_pin_memory": False, "bf16": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": task.samples_a_step, "learning_rate": LR,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": DECAY, "adam_beta1": 0.9,
        "adam_beta2": BETA2, "adam_epsilon": EPS, "max_grad_norm": CLIP, "per_device_eval_batch_size": 1000,
        **changes,
    }  # fmt: skip


def trainer(place: Path, task: Task, changes: Mapping[str, Any]) -> Any:
    """The Trainer, on ids and labels from its tokenizer's template, padded to the longest of a batch."""
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = rival_tokenizer(task)
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(task.model),
        args=TrainingArguments(**arguments(place, task, changes)),
        train_dataset=tokenized(task.records("train"), tokenizer),
        eval_dataset=tokenized(task.records("held"), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


def sft_trainer(place: Path, task: Task, changes: Mapping[str, Any]) -> Any:
    """SFTTrainer, on messages: it renders, masks and packs by itself."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    def messages(part: str) -> Any:
        return Dataset.from_dict({"messages": as_messages(task.records(part))})

    own: dict[str, Any] = {"assistant_only_loss": True, "max_length": task.max_tokens, "eval_packing": False}
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(task.model),
        args=SFTConfig(**own, **arguments(place, task, changes)),
        train_dataset=messages("train"),
        eval_dataset=messages("held"),
        processing_class=rival_tokenizer(task),
    )


def rival_tokenizer(task: Task) -> Any:
    """Our folder as transformers reads it. Padding needs some token; no id of it is ever looked at."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def tokenized(records: list[dict[str, str]], tokenizer: Any) -> Any:
    """A Dataset of input_ids, attention_mask and labels: what the template marks as generated is trained."""
    from datasets import Dataset

    done = tokenizer.apply_chat_template(as_messages(records), return_dict=True, return_assistant_tokens_mask=True)
    labels = [
        [n if trained else -100 for n, trained in zip(ids, mask, strict=True)]
        for ids, mask in zip(done["input_ids"], done["assistant_masks"], strict=True)
    ]
    columns = {"input_ids": done["input_ids"], "attention_mask": done["attention_mask"], "labels": labels}
    return Dataset.from_dict(columns)


# --- the run -------------------------------------------------------------------------------------------------------


def contestants(task: Task) -> dict[str, Run]:
    """Ours first."""
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    packed: dict[str, Any] = {"packing": True, "per_device_train_batch_size": task.rows}
    return {
        "framework sft": functools.partial(ours, task=task),
        "Trainer, padded": functools.partial(theirs, task=task, build=trainer),
        "Trainer, grouped by length": functools.partial(theirs, task=task, build=trainer, **grouped),
        "SFTTrainer, padded": functools.partial(theirs, task=task, build=sft_trainer),
        "SFTTrainer, packed": functools.partial(theirs, task=task, build=sft_trainer, **packed),
    }


def prepared(place: Path, args: Any) -> Task:
    """Model and data of a benchmark's command line, in `place`."""
    model_folder(place, args.width, args.layers)
    write_records(place / "train.jsonl", conversations()[: args.samples])
    write_records(place / "held.jsonl", conversations()[:64])
    shared = ("threads", "rounds", "steps", "rows", "max_tokens")
    return Task(place, **{name: getattr(args, name) for name in shared})


def facts(task: Task, args: Any) -> dict[str, Any]:
    """What a reader must know to make sense of the figures."""
    sizes = {name: getattr(args, name) for name in ("layers", "width", "threads")}
    batch = f"{task.rows} packed rows of {task.max_tokens} tokens (about {task.samples_a_step} samples)"
    return {**sizes, "vocabulary": load(task.model).vocab_size, "a step": batch, "a lap": f"{task.steps} steps"}


def main(argv: list[str] | None = None) -> None:
    """Run it; the sizes are those of model=tiny."""
    sizes = {"rounds": 12, "steps": 4, "rows": 16, "max_tokens": 128, "width": 128, "layers": 4, "threads": 1}
    args = options(__doc__ or "", argv, **sizes, samples=15000)
    with tempfile.TemporaryDirectory() as scratch:
        task = prepared(Path(scratch), args)
        report("SFT", compete(contestants(task), task.place, task.rounds), facts(task, args), args.out)


if __name__ == "__main__":
    main()
