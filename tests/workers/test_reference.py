"""The reference answers what the actor answered before it learned, bit for bit."""

from pathlib import Path

import torch
from tiny import PLACE, PPO, experience, generator_kwargs, policy_folder, prompts, spec

from framework.models.hub import load
from framework.workers.actor import Actor
from framework.workers.generator import Generator
from framework.workers.reference import Reference


def test_it_stays_where_the_actor_was(tmp_path: Path) -> None:
    folder = policy_folder(tmp_path)
    generator = Generator(PLACE, **generator_kwargs(folder))
    generator.load(list(load(folder).named_parameters()), version=0)
    rollout = generator.generate(prompts(4), samples=1, seed=0)
    actor, reference = Actor(PLACE, spec(folder), PPO), Reference(PLACE, spec(folder, optim=None))
    actor.published(0)
    before = actor.log_probs(rollout)
    assert torch.equal(reference.log_probs(rollout), before)
    actor.update(experience(rollout, before))
    assert torch.equal(reference.log_probs(rollout), before)
    assert not torch.equal(actor.log_probs(rollout), before)
