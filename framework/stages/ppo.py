"""PPO from a reward model, in the order of the paper (Schulman et al. 2017; Ouyang et al. 2022, section 3.5).

This process only coordinates: actor, critic, reference, reward model and generator are groups of workers, called
directly in this process or as Ray actors, and the loop cannot tell. Left out: how a call is split over ranks (marks in
`cluster`), how a worker computes (`workers`), and every formula (`objectives`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framework.core import random
from framework.core.masked import masked_mean, masked_sum
from framework.core.records import Experience, Rollout
from framework.core.registry import lookup
from framework.objectives.advantage import whiten
from framework.objectives.kl import adapt_coefficient, estimate_kl, token_rewards
from framework.stages.config import PpoRun
from framework.stages.roles import Roles
from framework.workers.config import KlControl, PpoConfig

Figures = dict[str, float]


@dataclass(frozen=True)
class State:
    """All that the loop remembers between iterations, besides weights and optimizers."""

    iteration: int = 0
    kl_coefficient: float = 0.0


def improve(config: PpoRun, roles: Roles, state: State) -> Iterator[tuple[State, Figures]]:
    """Run PPO from `state` on; yields after every iteration, at the boundary where saving is exact."""
    for iteration in range(state.iteration, config.ppo.iterations):
        roles.publish(version=iteration)
        rollout = roles.answer(roles.prompts.batch(iteration), seed=config.seed)
        judged = judge(roles, rollout)
        experience, figures = make_experience(rollout, judged, state.kl_coefficient, config.ppo)
        figures |= update(config, roles, experience, iteration)
        coefficient = next_coefficient(config.ppo, state.kl_coefficient, figures["ppo/kl/response"], len(rollout))
        state = State(iteration + 1, coefficient)
        yield state, figures


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
