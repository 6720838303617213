"""How good a policy is on prompts that PPO never trains on: scores, KL, variety, tasks; and one rollout to look at."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from framework.core.masked import masked_sum
from framework.core.records import Experience, PromptBatch, Rollout, Tokenizer
from framework.data.loader import Loader, RowSource
from framework.generation.config import SamplingConfig
from framework.generation.stream import answer_text, token_texts
from framework.generation.text import responses
from framework.objectives.kl import estimate_kl
from framework.stages.config import PpoRun
from framework.stages.job import Job, Teller, located
from framework.stages.roles import Roles
from framework.stages.samples import as_figures
from framework.stages.samples import run as run_task
from framework.tasks.metrics import bootstrap_error, distinct_n
from framework.tracking.atomic import replace_json

Figures = dict[str, float]
_SHOWN = 8  # answers kept for the report
_SEED = 1_000_003  # held-out answers are drawn apart from the training ones


def open_prompts(
    job: Teller, config: PpoRun, tokenizer: Tokenizer, open_rows: Callable[..., RowSource]
) -> tuple[Loader, RowSource]:
    """The training prompts as batches, and the held-out ones (the training ones where the recipe names none)."""
    data = located(config.data, job.say)
    data = replace(data, valid=data.valid or data.train, max_tokens=config.rollout.max_prompt_tokens)
    opened = []
    for part in ("train", "valid"):
        with job.preparing(part) as told:
            opened.append(open_rows(data, part, tokenizer, config.prepared, config.seed, told))
    job.say(f"{len(opened[0]):,} prompts, {len(opened[1]):,} held out; the first one:\n{opened[0].preview()}")
    batches = Loader(opened[0], config.rollout.prompts, config.seed)
    batches.require(config.ppo.iterations)
    return batches, opened[1]


@dataclass(frozen=True)
class Assessor:
    """Asks the generator for answers to the held-out prompts and has them judged."""

    job: Job
    config: PpoRun
    roles: Roles
    tokenizer: Tokenizer
    held_out: RowSource

    def assess(self, version: int) -> Figures:
        """Publish the actor as `version` and measure it; the same random numbers each time, so policies compare."""
        self.roles.publish(version)
        samples, limit = self.config.evaluation.samples, self.config.evaluation.limit or len(self.held_out)
        prompts = self.held_out.rows(np.arange(min(limit, len(self.held_out))))
        assert isinstance(prompts, PromptBatch)
        rollout = self.roles.answer(prompts, samples, self.config.seed + _SEED)
        scores = self.roles.reward.score(rollout).result()
        texts = [answer_text(self.tokenizer, ids) for ids in responses(rollout)]
        tasks = self._tasks()
        self._show(version, rollout, texts, scores)
        return _named(
            {
                "score": float(scores.mean()),
                "score_std": float(scores.std()) if len(scores) > 1 else 0.0,
                "kl": self._kl(rollout),
                "finished": float(rollout.finished.float().mean()),
                "distinct_2": distinct_n(texts, 2),
                "distinct_2/error": bootstrap_error(texts, lambda drawn: distinct_n(drawn, 2)),
            }
            | tasks
        )

    def conclude(self, before: Figures, after: Figures) -> None:
        """The rows of the closing table, and a prompt to try."""
        std = before["valid/score_std"]
        names = {"score": f"held-out reward score (SFT's deviation {std:.2f})", "distinct_2": "distinct-2 of answers"}
        names |= {task: task.replace("_", " ") for task in self.config.evaluation.tasks}
        for name, what in names.items():
            self.job.learned(what, after[f"valid/{name}"], before[f"valid/{name}"])
        self.job.learned("KL from the SFT model, nats a response", after["valid/kl"], before["valid/kl"])

    def _kl(self, rollout: Rollout) -> float:
        """Mean KL(policy, reference) in nats a response: the sampled log-ratio, summed over its tokens (k1)."""
        policy = self.roles.actor.log_probs(rollout)
        reference = self.roles.reference.log_probs(rollout)
        kl = estimate_kl(policy.result(), reference.result(), "k1")
        return float(masked_sum(kl, rollout.response_mask)) / len(rollout)

    def _tasks(self) -> Figures:
        sampling = SamplingConfig(self.config.rollout.max_tokens, self.config.rollout.temperature)
        figures: Figures = {}
        for task in self.config.evaluation.tasks:
            result = run_task(task, _Policy(self.roles), self.tokenizer, sampling, self.config.evaluation)
            figures |= as_figures(result)
        return figures

    def _show(self, version: int, rollout: Rollout, texts: list[str], scores: Tensor) -> None:
        for b in range(0, len(rollout), max(1, len(rollout) // _SHOWN)):
            prompt = rollout.tokens[b][rollout.token_mask[b] & ~rollout.response_mask[b]]
            text = self.tokenizer.decode(prompt.tolist())
            record = {"prompt": text, "response": texts[b], "score": round(float(scores[b]), 4)}
            self.job.folder.sample(version, record)


@dataclass(frozen=True)
class _Policy:
    """The generator group, as something that runs tasks may hold."""

    roles: Roles
    reads_apart = False  # ppo trains no model whose encoder reads the prompts

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, samples: int = 1, seed: int = 0) -> Rollout:
        return self.roles.answer(prompts, samples, seed)


def show_rollout(job: Job, tokenizer: Tokenizer, experience: Experience, scores: Tensor, step: int) -> None:
    """rollout.json: the first response of an iteration, token by token, for the report."""
    first = experience.select(slice(0, 1))
    length = int(first.rollout.token_mask.sum())
    kl = first.old_log_probs - first.reference_log_probs
    tracks = {
        "log_probs": first.old_log_probs,
        "reference_log_probs": first.reference_log_probs,
        "kl": kl,
        "rewards": first.rewards,
        "values": first.values,
        "advantages": first.advantages,
    }
    ids = first.rollout.tokens[0, :length].tolist()
    content = {
        "tokens": token_texts(tokenizer, ids),
        "response_mask": first.rollout.response_mask[0, :length].tolist(),
        **{name: [round(x, 5) for x in track[0, :length].tolist()] for name, track in tracks.items()},
        "score": float(scores[0]),
        "step": step,
    }
    replace_json(Path(job.folder.path) / "rollout.json", content)


def _named(figures: Figures) -> Figures:
    return {f"valid/{name}": figure for name, figure in figures.items()}
