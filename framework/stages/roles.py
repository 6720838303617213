"""The cast of PPO: five groups of workers, and what the loop asks of all of them together.

Left out: the loop (`ppo`), and what a role computes (`workers`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from framework.checkpoint.manager import Checkpoint
from framework.cluster.group import Group
from framework.cluster.session import Cluster, open_cluster
from framework.core.config import require
from framework.core.records import PromptBatch, Rollout, Tokenizer
from framework.core.signals import StopRequest
from framework.data.hub import SCHEME
from framework.data.loader import RowSource
from framework.engine.plan import check
from framework.engine.sketch import Share, trace
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.models.config import ModelConfig
from framework.models.hub import read_folder
from framework.models.lora import lora_shapes, still
from framework.parallel.words import layout_in_words, node_in_words
from framework.stages.config import PpoRun
from framework.stages.extensions import absolute
from framework.stages.job import Job, located
from framework.stages.ops import settle_worker, wanted_ops
from framework.tracking.divergence import Trace
from framework.workers.actor import Actor
from framework.workers.config import MODEL, EngineSpec
from framework.workers.critic import Critic
from framework.workers.generator import Generator
from framework.workers.publish import publish
from framework.workers.reference import Reference
from framework.workers.reward import Reward
from framework.workers.rule import Rule

ROLES = ("actor", "critic", "reference", "reward", "generator")
_CANARIES = 4  # prompts that prove a publication


@dataclass(frozen=True)
class Roles:
    """The groups, up and ready. `reward` is the reward model, or a rule."""

    actor: Group
    critic: Group
    reference: Group
    reward: Group
    generator: Group
    canary: PromptBatch
    strict: bool
    tokenizer: Tokenizer
    stop: StopRequest

    def publish(self, version: int) -> dict[str, float]:
        """Give the generator the actor's weights as policy `version`, and prove it (law Sync)."""
        return publish(self.actor, self.generator, version, self.canary, self.strict)

    def digest(self) -> str:
        """16 hex digits that name the bits of the actor's weights."""
        digest: str = self.actor.digest().result()
        return digest

    def trace(self) -> Trace:
        """What two runs are compared by, of the actor's weights."""
        shares: list[list[Share]] = self.actor.shares().result()
        return trace([], shares)

    def answer(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        """`samples` responses a prompt from the policy last published. A safe point while it waits, and at the end."""
        pending = self.generator.generate(prompts, samples=samples, seed=seed)
        rollout: Rollout = pending.result(partial(self.stop.leave, "while generating"))
        self.leave("after generating")
        return rollout

    def asked(self) -> int:
        """The exit code that this process, or any worker's, was asked to leave with; 0 = none was."""
        groups = (self.actor, self.critic, self.reference, self.reward, self.generator)
        answers = [group.asked() for group in groups]
        return self.stop.exit_code or max(answer.result() for answer in answers)

    def leave(self, where: str) -> None:
        """A safe point: nothing has been updated since the last checkpoint could have been saved."""
        if exit_code := self.asked():
            raise self.stop.error(where, exit_code)

    def save(self, staging: Path) -> None:
        """Write what learns into a checkpoint's staging folder."""
        pending = [group.save_part(str(staging)) for group in (self.actor, self.critic)]
        for part in pending:
            part.result()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Bring what learns back to a checkpoint."""
        pending = [group.restore(str(checkpoint.folder)) for group in (self.actor, self.critic)]
        for part in pending:
            part.result()

    def export(self, folder: Path, tokenizer: Tokenizer, adapts: bool) -> str:
        """Write model/ and critic/ in the Hugging Face format, and where the policy `adapts` its adapter/; why that is
        not there, or ""."""
        extra = {"eos_token_id": tokenizer.end_id, "bos_token_id": tokenizer.bos_id}
        adapter = folder / "adapter"
        missing: str = self.actor.export(str(folder / "model"), extra, str(adapter) if adapts else "").result()
        self.critic.export(str(folder / "critic"), extra).result()
        for path in (folder / "model", folder / "critic", *([adapter] if adapts and not missing else [])):
            tokenizer.save(str(path))
        return missing


@contextmanager
def open_roles(job: Job, config: PpoRun, tokenizer: Tokenizer, canary: RowSource) -> Iterator[Roles]:
    """Start the five groups, in this process or on Ray, and wait until all are up. They end with the block."""
    first = canary.rows(np.arange(min(_CANARIES, len(canary))))
    assert isinstance(first, PromptBatch)
    actor, critic = engine_specs(config)
    for spec in (actor, critic):
        model = read_folder(spec.folder)[0]
        _refuse_unfit(config, model)
        check(model, spec.parallel, spec.engine, config.cluster.workers, spec.lora)
        if spec.lora is not None:  # what is not there is refused now
            lora_shapes(model, spec.lora)
            still(model, spec.lora)
    with open_cluster(
        config.cluster,
        dict.fromkeys(ROLES, config.cluster.workers),
        logs=job.folder.path / "logs",
        device=config.device,
        deterministic=config.deterministic,
        prepare=partial(
            settle_worker, absolute(config.extensions), job.facts["extensions"], wanted_ops(config), config.device
        ),
    ) as cluster:
        _show_map(job, config, cluster)
        frozen = replace(actor, optim=None, lora=None)
        groups = {
            "actor": cluster.group("actor", Actor, spec=actor, ppo=config.ppo),
            "critic": cluster.group("critic", Critic, spec=critic, ppo=config.ppo),
            "reference": cluster.group("reference", Reference, spec=frozen),
            "reward": _reward(cluster, config, replace(frozen, folder=config.reward_from)),
            "generator": cluster.group("generator", Generator, **_generator(config, tokenizer)),
        }
        for group in groups.values():
            group.ready()
            job.stop.leave("while the workers came up")
        yield Roles(**groups, canary=first, strict=config.rollout.strict, tokenizer=tokenizer, stop=job.stop)


def _refuse_unfit(config: PpoRun, model: ModelConfig) -> None:
    """A model that PPO cannot train, and rows that it cannot generate."""
    require(
        model.encoder is None,
        f"ppo does not train a model of architecture={model.architecture}; it takes one of causal, prefix",
    )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_tokens
    original = model.rope_scaling.original_positions
    require(
        not model.scales_by_length or longest <= original,
        f"rollout.max_prompt_tokens + rollout.max_tokens = {longest} is longer than {original}, the "
        "context in which dynamic rotary scaling leaves a cache's keys as they are: choose less",
    )


def _show_map(job: Job, config: PpoRun, cluster: Cluster) -> None:
    """The layout, and which role's ranks stand on which node and device. Generators and rules hold all they need."""
    world = config.cluster.workers
    job.say(f"ppo: layout: {layout_in_words(config.parallel, world)}; every generator holds the whole policy")
    whole = ["generator"] if config.ppo.reward == MODEL else ["generator", "reward"]
    for roles, nodes in cluster.standing().items():
        layout = None if roles in whole else config.parallel
        for node, devices in nodes.items():
            job.say(f"ppo: {roles}: node {node}: {node_in_words(devices, layout, world)}")


def engine_specs(config: PpoRun) -> tuple[EngineSpec, EngineSpec]:
    """How the actor's and the critic's engines are built. Strict rollouts need strict engines: law On-policy."""
    updates = config.rollout.prompts * config.rollout.samples // config.batch.size * config.ppo.epochs
    actor = EngineSpec(
        folder=config.init_from,
        parallel=config.parallel,
        engine=replace(config.engine, strict=config.engine.strict or config.rollout.strict),
        micro_size=config.batch.micro(config.parallel.data_size(config.cluster.workers)),
        optim=config.optim,
        total_steps=config.ppo.iterations * updates,
        temperature=config.rollout.temperature,
        lora=config.lora if config.lora.rank else None,
        seed=config.seed,
    )
    critic = config.reward_from or config.init_from
    optim = replace(config.optim, lr=config.ppo.critic_lr or config.optim.lr)
    return actor, replace(actor, folder=critic, optim=optim, temperature=1.0)


def _reward(cluster: Cluster, config: PpoRun, spec: EngineSpec) -> Group:
    if config.ppo.reward == MODEL:
        return cluster.group("reward", Reward, spec=spec)
    data = located(config.data)
    return cluster.group(
        "reward",
        Rule,
        name=config.ppo.reward,
        tokenizer=config.init_from,
        spec=spec if spec.folder else None,
        prompts=[_anywhere(path) for path in [*data.train, *data.valid_paths]],
        format=config.data.format,
    )


def _anywhere(path: str) -> str:
    """Data as a worker finds it, whatever folder it works in."""
    return path if path.startswith(SCHEME) else str(Path(path).absolute())


def _generator(config: PpoRun, tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "folder": config.init_from,
        "sampling": SamplingConfig(max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature),
        "generation": GenerationConfig(slots=config.rollout.slots, strict=config.rollout.strict),
        "stop_ids": (tokenizer.end_id,),
        "width": config.width,
        "lora": config.lora if config.lora.rank else None,
    }
