"""PPO from a reward model, in the order of the paper (Schulman et al. 2017; Ouyang et al. 2022, section 3.5).

This process only coordinates: actor, critic, reference, reward model and generator are groups of workers, called
directly in this process or as Ray actors, and the loop cannot tell. Left out: how a call is split over ranks (marks in
`cluster`), how a worker computes (`workers`), and every formula (`objectives`).
"""

import os
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from framework.checkpoint.manager import CheckpointManager
from framework.core import random
from framework.core.errors import Interrupted, UsageError, foreign
from framework.core.masked import masked_mean, masked_sum
from framework.core.records import Experience, Rollout
from framework.core.registry import lookup
from framework.data.loader import Loader
from framework.data.prompts import open_rows
from framework.objectives.advantage import whiten
from framework.objectives.kl import adapt_coefficient, estimate_kl, token_rewards
from framework.stages.assessment import Assessor, open_prompts, show_rollout
from framework.stages.config import PpoRun
from framework.stages.job import Job, Run, open_job
from framework.stages.roles import Roles, open_roles
from framework.tokenization.load import load as load_tokenizer
from framework.tracking.config import DIGEST
from framework.tracking.progress import Progress
from framework.workers.config import KlControl, PpoConfig

Figures = dict[str, float]


@dataclass(frozen=True)
class State:
    """All that the loop remembers between iterations, besides weights and optimizers."""

    iteration: int = 0
    kl_coefficient: float = 0.0
    before: Figures = field(default_factory=dict)  # the held-out figures of the policy that it began with


def run(config: PpoRun) -> Run:
    """Improve the policy of init_from against the reward model of reward_from; export model/ and
    critic/, and adapter/ where that is what learnt."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            "ppo is run by one controller, not under torchrun: framework ppo ... cluster=ray cluster.workers=N"
        )
    with open_job(config, {"init_from": config.init_from, "reward_from": config.reward_from}) as job:
        if job.finished:
            return job.result()
        tokenizer = load_tokenizer(config.init_from)
        prompts, held_out = open_prompts(job, config, tokenizer, open_rows)
        with open_roles(job, config, tokenizer, held_out) as roles:
            assessor = Assessor(job, config, roles, tokenizer, held_out)
            state = improve(job, config, roles, prompts, assessor)
            after = assessor.assess(config.ppo.iterations)
            if missing := roles.export(job.folder.path, tokenizer, bool(config.lora.rank)):
                job.say(missing)
        assessor.conclude(state.before, after)
        return job.finish(after | {f"{name}/before": figure for name, figure in state.before.items()})


def improve(job: Job, config: PpoRun, roles: Roles, prompts: Loader, assessor: Assessor) -> State:
    """The loop. It is saved, stopped and continued at the boundary between two iterations; a stop breaks off an
    iteration that has not updated anything yet, and its rollout is drawn again."""
    manager = CheckpointManager(job.folder.checkpoints, config.checkpoint, guard=job.folder.require_own)
    state = resume(config, roles, manager)
    saved = state.iteration if state.before else -1
    job.folder.cut_back(saved)
    if not state.before:
        state = replace(state, before=assessor.assess(0))
        if first := weights_digest(job, config, roles, 0):
            job.folder.log(0, first)
    total = config.ppo.iterations

    def save(figures: Figures) -> None:
        with manager.saving(state.iteration, asdict(state), figures) as staging:
            roles.save(staging)
        job.folder.flush()

    with Progress("ppo", total, "iterations", state.iteration, config.tracking.progress) as progress:
        while state.iteration < total:
            try:
                state, figures = iterate(job, config, roles, prompts, state)
            except Interrupted:
                if saved != state.iteration:
                    save({})
                raise
            job.folder.log(state.iteration, {**figures, **weights_digest(job, config, roles, state.iteration)})
            job.folder.advance(state.iteration, total)
            progress(state.iteration, score=figures["ppo/score/mean"], kl=figures["ppo/kl/response"])
            asked, every = roles.asked(), config.checkpoint.every
            if asked or state.iteration == total or (every and state.iteration % every == 0):
                save(figures)
                saved = state.iteration
            if asked:
                raise job.stop.error(f"after iteration {state.iteration} of {total}", asked)
    return state


def iterate(job: Job, config: PpoRun, roles: Roles, prompts: Loader, state: State) -> tuple[State, Figures]:
    """One iteration: publish, answer, judge, make experience, update."""
    synced = roles.publish(version=state.iteration)
    rollout = roles.answer(prompts.batch(state.iteration), config.rollout.samples, config.seed)
    judged = judge(roles, rollout)
    roles.leave("before the update")
    experience, figures = make_experience(rollout, judged, state.kl_coefficient, config.ppo)
    figures |= synced | update(config, roles, experience, state.iteration)
    show_rollout(job, roles.tokenizer, experience, judged.scores, state.iteration + 1)
    coefficient = next_coefficient(config.ppo, state.kl_coefficient, figures["ppo/kl/response"], len(rollout))
    return replace(state, iteration=state.iteration + 1, kl_coefficient=coefficient), figures


def weights_digest(job: Job, config: PpoRun, roles: Roles, iteration: int) -> dict[str, str]:
    """The actor's digest where the recipe asks for one at this iteration, and beside it a trace: what two runs are
    compared by."""
    every = config.tracking.digest_every
    if not every or iteration % every:
        return {}
    job.folder.trace(iteration, roles.trace())
    return {DIGEST: roles.digest()}


def resume(config: PpoRun, roles: Roles, manager: CheckpointManager) -> State:
    """Bring the workers to the newest checkpoint that verifies; the beginning where there is none."""
    checkpoint = manager.latest()
    if checkpoint is None:
        return State(kl_coefficient=config.ppo.kl_coefficient)
    roles.restore(checkpoint)
    return State(**checkpoint.state)


@dataclass(frozen=True)
class Judged:
    """What the four judges say of a rollout, at token positions."""

    scores: Tensor  # [B] of the reward model
    old_log_probs: Tensor  # [B, T] the actor's own, before the update
    reference_log_probs: Tensor  # [B, T]
    values: Tensor  # [B, T]


def judge(roles: Roles, rollout: Rollout) -> Judged:
    """Ask all four at once, then wait for all."""
    scores = roles.reward.score(rollout)
    old = roles.actor.log_probs(rollout)
    reference = roles.reference.log_probs(rollout)
    values = roles.critic.values(rollout)
    return Judged(scores.result(), old.result(), reference.result(), values.result())


def make_experience(rollout: Rollout, judged: Judged, coefficient: float, ppo: PpoConfig) -> tuple[Experience, Figures]:
    """KL into the reward, score on the last token, GAE, whitening: pure. Returns the experience and what to report."""
    mask = rollout.response_mask
    scores = shaped_scores(judged.scores, rollout.finished, ppo)
    kl = estimate_kl(judged.old_log_probs, judged.reference_log_probs, ppo.kl_kind.value)
    rewards = token_rewards(scores, kl, mask, coefficient)
    with foreign(f"ppo.advantage={ppo.advantage} failed"):
        advantages, returns = lookup("advantage", ppo.advantage)(
            rewards, judged.values, mask, gamma=ppo.gamma, lam=ppo.lam, group_ids=rollout.row
        )
    experience = Experience(
        rollout=rollout,
        old_log_probs=judged.old_log_probs,
        reference_log_probs=judged.reference_log_probs,
        values=judged.values,
        rewards=rewards,
        advantages=whiten(advantages, mask) if ppo.whiten_advantages else advantages,
        returns=returns,
    )
    return experience, _figures(judged, experience, kl, coefficient)


def shaped_scores(scores: Tensor, finished: Tensor, ppo: PpoConfig) -> Tensor:
    """[B]: clipped where the recipe clips, less the penalty where the response never stopped."""
    clipped = scores.clamp(-ppo.score_clip, ppo.score_clip) if ppo.score_clip else scores
    return clipped - ppo.missing_eos_penalty * (~finished)


def update(config: PpoRun, roles: Roles, experience: Experience, iteration: int) -> Figures:
    """`ppo.epochs` passes over the experience in shuffled minibatches; the critic alone while it warms up."""
    warm = iteration >= config.ppo.critic_warmup
    reports: list[Figures] = []
    for epoch in range(config.ppo.epochs):
        for minibatch in minibatches(experience, config.batch.size, config.seed, iteration, epoch):
            critic = roles.critic.update(minibatch)
            actor = roles.actor.update(minibatch) if warm else None
            reports.append(critic.result() | (actor.result() if actor else {}))
            if config.ppo.stop_kl and reports[-1].get("actor/approx_kl", 0.0) > config.ppo.stop_kl:
                return _means(reports) | {"actor/stopped_early": 1.0}
    return _means(reports)


def minibatches(experience: Experience, size: int, seed: int, iteration: int, epoch: int) -> list[Experience]:
    """A fresh shuffle each epoch, a pure function of (seed, iteration, epoch)."""
    order = random.shuffled(seed, f"minibatches:{iteration}:{epoch}", len(experience), np.arange(len(experience)))
    return experience.select(torch.from_numpy(order)).split(size)


def next_coefficient(ppo: PpoConfig, coefficient: float, kl: float, responses: int) -> float:
    """The KL coefficient of the next iteration; `kl` in nats a response."""
    if ppo.kl_control is KlControl.FIXED:
        return coefficient
    return adapt_coefficient(coefficient, kl, ppo.kl_target, ppo.kl_horizon, responses)


def _figures(judged: Judged, experience: Experience, kl: Tensor, coefficient: float) -> Figures:
    rollout, mask = experience.rollout, experience.rollout.response_mask
    rows = len(rollout)
    gap = torch.where(mask, (rollout.log_probs - judged.old_log_probs).abs(), 0.0)
    return {
        "ppo/score/mean": float(judged.scores.mean()),
        "ppo/score/std": float(judged.scores.std()) if rows > 1 else 0.0,
        "ppo/kl/response": float(masked_sum(kl, mask)) / rows,
        "ppo/kl/coefficient": coefficient,
        "ppo/response/tokens": float(mask.sum()) / rows,
        "ppo/response/finished": float(rollout.finished.float().mean()),
        "ppo/return/mean": float(masked_mean(experience.returns, mask)),
        "ppo/generator_gap/max": float(gap.max()),
    }


def _means(reports: list[Figures]) -> Figures:
    names = sorted(set().union(*reports))
    return {n: float(np.mean([r[n] for r in reports if n in r])) for n in names}
