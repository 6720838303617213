"""An iteration of PPO: rollout, scores, experience, update, beside the same of transformers' models and plain torch.

Ours is what `framework ppo` runs in one process: the five roles, the loop's own functions, publication and its proof
with them; actor and critic compute in bf16, the generator in fp32, as it does for every recipe. No answer ends early:
both sides draw and learn from equally many tokens. Left out: evaluation, samples, checkpoints.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from framework.cluster.group import LocalGroup
from framework.core.records import PromptBatch, Rollout
from framework.core.runtime import Runtime
from framework.core.signals import StopRequest
from framework.data.config import BatchConfig, DataConfig
from framework.engine.config import EngineConfig, Precision
from framework.engine.precision import COMPUTE
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.optim.config import OptimConfig, Schedule
from framework.stages.config import PpoRun
from framework.stages.ppo import Figures, judge, make_experience, update
from framework.stages.roles import Roles, engine_specs
from framework.workers.actor import Actor
from framework.workers.config import PpoConfig, RolloutConfig
from framework.workers.critic import Critic
from framework.workers.generator import Generator
from framework.workers.reference import Reference
from framework.workers.reward import Reward
from tests.benchmarks.end_to_end.bare_ppo import BareLoop
from tests.benchmarks.end_to_end.card import Bench
from tests.benchmarks.end_to_end.llamas import VOCABULARY, llama, write

CANARIES = 4
RIVAL = "a bare loop"


@dataclass(frozen=True)
class Task:
    """The same for both: a Llama for all roles, prompts of an iteration, tokens of a prompt and of an answer, and
    `size`, answers of an update."""

    name: str
    prompts: int
    prompt: int
    answer: int
    size: int
    precision: Precision = Precision.BF16

    def batch(self) -> PromptBatch:
        """Random prompts, the same in every iteration."""
        shape = (self.prompts, self.prompt)
        tokens = torch.randint(VOCABULARY[self.name], shape, generator=torch.Generator().manual_seed(0))
        return PromptBatch(tokens, torch.ones(shape, dtype=torch.bool), torch.arange(self.prompts))


TASKS = (Task("124m", 128, 128, 256, 32),)
TINY = (Task("tiny", 4, 8, 8, 2),)


def run(bench: Bench, task: Task) -> None:
    """A line each."""
    with tempfile.TemporaryDirectory() as place:
        config, prompts = recipe(task, Path(place)), task.batch()
        bench.forget()
        ours, bare = OurLoop(config, prompts, bench.here), BareLoop(config, bench.here.device, COMPUTE[task.precision])
        drawn = ours.draw(prompts).response_mask.sum(1)
        assert bool((drawn == task.answer).all()), f"answers of {drawn.tolist()} tokens, {task.answer} are the rival's"
        work = {"framework": lambda: ours.iterate(prompts), RIVAL: lambda: bare.iterate(prompts.tokens)}
        case = f"{task.name}, {task.prompts} answers, {task.prompt} + {task.answer} tokens"
        bench.race("ppo", case, task.prompts, "answers", work, {side: {} for side in work})


def recipe(task: Task, place: Path) -> PpoRun:
    """As a recipe would say it; policy and reward model, of random weights, are written into `place`."""
    model = llama(task.name)
    return PpoRun(
        init_from=str(write(model, place / "policy")),
        reward_from=str(write(model, place / "reward", classes=1)),
        data=DataConfig(train=["prompts"]),
        batch=BatchConfig(size=task.size),
        rollout=RolloutConfig(
            prompts=task.prompts,
            max_prompt_tokens=task.prompt,
            max_tokens=task.answer,
            slots=task.prompts,
            strict=False,
        ),
        ppo=PpoConfig(missing_eos_penalty=0.0),
        optim=OptimConfig(lr=1e-5, schedule=Schedule.CONSTANT, warmup=0.0, weight_decay=0.0),
        engine=EngineConfig(precision=task.precision),
    )


class OurLoop:
    """`framework ppo` without a job around it."""

    def __init__(self, config: PpoRun, prompts: PromptBatch, here: Runtime):
        self.config, self.iteration = config, -1
        self.roles = roles(config, prompts.select(slice(0, CANARIES)), here)

    def iterate(self, prompts: PromptBatch) -> Figures:
        """One iteration."""
        return self.learn(self.draw(prompts))

    def draw(self, prompts: PromptBatch) -> Rollout:
        """Answers of the policy as it is now."""
        self.iteration += 1
        self.roles.publish(self.iteration)
        return self.roles.answer(prompts, samples=1, seed=self.iteration)

    def learn(self, rollout: Rollout) -> Figures:
        """From answers to new weights."""
        ppo = self.config.ppo
        experience, figures = make_experience(rollout, judge(self.roles, rollout), ppo.kl_coefficient, ppo)
        return figures | update(self.config, self.roles, experience, self.iteration)


def roles(config: PpoRun, canary: PromptBatch, here: Runtime) -> Roles:
    """All five in this process."""
    actor, critic = engine_specs(config)
    frozen = replace(actor, optim=None)
    rollout = config.rollout
    given: dict[str, tuple[type, dict[str, Any]]] = {
        "actor": (Actor, {"spec": actor, "ppo": config.ppo}),
        "critic": (Critic, {"spec": critic, "ppo": config.ppo}),
        "reference": (Reference, {"spec": frozen}),
        "reward": (Reward, {"spec": replace(frozen, folder=config.reward_from)}),
        "generator": (
            Generator,
            {
                "folder": config.init_from,
                "sampling": SamplingConfig(max_tokens=rollout.max_tokens),
                "generation": GenerationConfig(slots=rollout.slots),
                "stop_ids": (),
                "width": config.width,
            },
        ),
    }
    groups = {role: LocalGroup(role, kind, {"runtime": here, **words}) for role, (kind, words) in given.items()}
    none = cast(Any, None)  # no text is made here, and nobody asks this process to stop in the middle
    return Roles(**groups, canary=canary, strict=False, tokenizer=none, stop=StopRequest())
