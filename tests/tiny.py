"""The quickstart shortened for tests: the same stages and code, a part of the corpus, a model of a few thousand
parameters.

`model_folders` is for tests that need models to start from, and not good ones.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

from framework.core.records import whole
from framework.main import main
from framework.models.config import ModelConfig
from framework.models.hub import save_weights
from framework.models.init import parameter_shapes, random_weights
from framework.tasks.task import corpus_folder
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.train import train

WORDS = [
    "experiment=quickstart",
    "device=cpu",
    "threads=1",
    "tracking.every=1",
    "tracking.digest_every=1",
    "tracking.progress=false",
    "pretrain.model.hidden_size=32",
    "pretrain.model.num_layers=1",
    "pretrain.model.num_heads=2",
    # Its 8000 rows, and all that is held out, take longer to prepare and to measure than the steps take.
    "pretrain.data.train=[corpora/tang/valid.txt]",
    "sft.data.train=[corpora/tang/sft.valid.jsonl]",
    "reward_model.data.train=[corpora/tang/preference.valid.jsonl]",
    *(f"{stage}.data.valid=0.05" for stage in ("pretrain", "sft", "reward_model")),
    "pretrain.train.steps=8",
    "pretrain.train.validate_every=4",
    "pretrain.batch.size=4",
    "pretrain.evaluation.limit=4",
    "pretrain.evaluation.baselines=false",
    "sft.train.steps=8",
    "sft.batch.size=4",
    "sft.evaluation.limit=4",
    "reward_model.train.steps=8",
    "reward_model.batch.size=4",
    "reward_model.evaluation.baselines=false",
    "ppo.cluster=in_process",
    "ppo.ppo.iterations=3",
    "ppo.ppo.epochs=1",
    "ppo.rollout.prompts=4",
    "ppo.rollout.samples=2",
    "ppo.batch.size=4",
    "ppo.evaluation.limit=4",
    "ppo.evaluation.samples=2",
    "evaluate.evaluation.limit=4",
    *(f"{stage}.checkpoint.every=2" for stage in ("pretrain", "sft", "reward_model")),
    "ppo.checkpoint.every=1",
]
# Of a PPO run on `model_folders`, three iterations in this process.
PPO = [
    *(word.removeprefix("ppo.") for word in WORDS if word.startswith("ppo.")),
    *(word for word in WORDS if word.partition("=")[0] in ("device", "threads", "tracking.every", "tracking.progress")),
    "data.train=[corpora/tang/prompts.train.jsonl]",
    "data.valid=[corpora/tang/prompts.test.jsonl]",
    "rollout.max_prompt_tokens=20",
    "rollout.max_tokens=12",
]
STAGES = ["tokenizer", "pretrain", "sft", "reward_model", "ppo", "evaluate"]


def command(*words: str) -> list[str]:
    """`framework WORDS...` as a user's shell would start it."""
    return [sys.executable, "-m", "framework.main", *words]


def environment() -> dict[str, str]:
    """The test's own environment, without anything that would speak to a network or a terminal."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}


def model_folders(folder: Path) -> tuple[str, str]:
    """(policy, reward model): random weights, and a tokenizer that knows the characters of the corpus."""
    text = (corpus_folder("tang") / "train.txt").read_text(encoding="utf-8")
    tokenizer = train(iter(text.splitlines()), TokenizerConfig(kind=TokenizerKind.CHARACTER, vocab_size=2816))
    model = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, max_positions=64)
    read = random_weights(model, 1)
    weights = [(name, read(name, whole(shape))) for name, shape in parameter_shapes(model).items()]
    head = "class_head.weight"
    save_weights(model, weights, folder / "policy")
    save_weights(model, [*weights, (head, read(head, whole((1, 32))))], folder / "reward", classes=1)
    for name in ("policy", "reward"):
        tokenizer.save(str(folder / name))
    return str(folder / "policy"), str(folder / "reward")


def framework(*words: str, cwd: Path, timeout: float = 280, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; with `check` a failure shows what it printed."""
    done = subprocess.run(
        command(*words), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def forked(*words: str, cwd: Path, timeout: float = 280, check: bool = True) -> subprocess.CompletedProcess[str]:
    """As `framework`, in a fork of this process, which has its imports behind it: seconds sooner. Not for Ray."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def run() -> None:
            os.chdir(cwd)
            os.environ |= environment()
            for descriptor, stream in ((1, out), (2, err)):
                os.dup2(stream.fileno(), descriptor)
            sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w"), open(2, "w")  # noqa: SIM115
            code = main(list(words))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(timeout)
        process.kill()  # one that hangs
        process.join()
        out.seek(0)
        err.seek(0)
        assert process.exitcode is not None
        done = subprocess.CompletedProcess(words, process.exitcode, out.read(), err.read())
    assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def fork(argv: list[str], log: Path, ask: str = "") -> BaseProcess:
    """`framework ARGV...` in a fork of this process, to be stopped on its way. `ask` is what `tests/ask.py` asks."""

    def run() -> None:
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        os.environ.pop("ASK", None)
        if ask:
            os.environ["ASK"] = ask
        os._exit(main(argv))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def end(process: BaseProcess, log: Path) -> tuple[int | None, str]:
    process.join(120)
    return process.exitcode, log.read_text()
