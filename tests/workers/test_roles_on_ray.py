"""The roles as Ray actors, actor and critic on two FSDP ranks each: what they answer, learn, publish and save equals
one process. One Ray for all.

Bounds are law Layout's: log-probs and values of one forward differ in fp32 rounding alone; updated weights within
tol x max(max|w|, RMS of all weights) under AdamW(eps 1e-5).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PLACE, PPO, experience, generator_kwargs, policy_folder, prompts, reward_folder, spec

from framework.checkpoint.manager import CheckpointManager
from framework.cluster.config import ClusterConfig, ClusterKind
from framework.cluster.group import Group, LocalGroup
from framework.cluster.session import open_cluster
from framework.core.records import Rollout
from framework.models.hub import load
from framework.parallel.config import ParallelConfig
from framework.workers.actor import Actor
from framework.workers.critic import Critic
from framework.workers.generator import Generator
from framework.workers.publish import publish

FSDP = ParallelConfig("fsdp", shard=0)
CLUSTER = ClusterConfig(kind=ClusterKind.RAY, workers=2, deadline_s=120.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return policy_folder(root / "policy"), reward_folder(root / "reward")


@pytest.fixture(scope="module")
def on_ray(folders: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Group]]:
    worlds = {"actor": 2, "critic": 2, "generator": 1}
    logs = tmp_path_factory.mktemp("run") / "logs"
    with open_cluster(CLUSTER, worlds, logs=logs, device="cpu") as cluster:
        groups = {
            "actor": cluster.group("actor", Actor, spec=spec(folders[0], parallel=FSDP), ppo=PPO),
            "critic": cluster.group("critic", Critic, spec=spec(folders[1], parallel=FSDP), ppo=PPO),
            "generator": cluster.group("generator", Generator, **generator_kwargs(folders[0])),
        }
        for group in groups.values():
            group.ready()
        yield groups


@pytest.fixture(scope="module")
def in_process(folders: tuple[str, str]) -> dict[str, Group]:
    def group(role: str, worker_class: type, **kwargs: Any) -> Group:
        return LocalGroup(role, worker_class, {"runtime": PLACE, **kwargs})

    return {
        "actor": group("actor", Actor, spec=spec(folders[0]), ppo=PPO),
        "critic": group("critic", Critic, spec=spec(folders[1]), ppo=PPO),
        "generator": group("generator", Generator, **generator_kwargs(folders[0])),
    }


def answer(roles: dict[str, Group], version: int) -> tuple[Rollout, dict[str, float]]:
    figures = publish(roles["actor"], roles["generator"], version, prompts(2), strict=True)
    return roles["generator"].generate(prompts(5), samples=2, seed=version).result(), figures


def test_a_ppo_step_equals_one_process(
    on_ray: dict[str, Group], in_process: dict[str, Group], tmp_path: Path, folders: tuple[str, str]
) -> None:
    rollout, sync = answer(on_ray, version=0)
    local_rollout, _ = answer(in_process, version=0)
    assert sync["sync/canary_gap"] == 0.0
    assert torch.equal(rollout.tokens, local_rollout.tokens)

    outcomes = []
    for roles in (on_ray, in_process):
        old, values = roles["actor"].log_probs(rollout), roles["critic"].values(rollout)
        batch = experience(rollout, old.result(), values.result())
        actor, critic = roles["actor"].update(batch), roles["critic"].update(batch)
        outcomes.append((batch, actor.result() | critic.result()))
    (batch, figures), (local_batch, local_figures) = outcomes

    assert torch.equal(batch.old_log_probs, local_batch.old_log_probs)
    torch.testing.assert_close(batch.values, local_batch.values, rtol=0, atol=1e-6)
    assert figures["actor/ratio_deviation"] == 0.0
    assert figures == pytest.approx(local_figures, rel=1e-4, abs=1e-6)

    for name, roles in (("ray", on_ray), ("local", in_process)):
        roles["actor"].export(str(tmp_path / name), {}).result()
    updated, expected, start = (
        dict(load(folder).named_parameters()) for folder in (tmp_path / "ray", tmp_path / "local", folders[0])
    )
    rms = torch.cat([w.flatten() for w in expected.values()]).square().mean().sqrt()
    for name, weight in expected.items():
        assert (updated[name] - weight).abs().max() <= 1e-5 * max(weight.abs().max(), rms), name
        assert (updated[name] - start[name]).abs().max() > 1e-4, name


def test_what_two_ranks_save_one_process_restores(
    on_ray: dict[str, Group], folders: tuple[str, str], tmp_path: Path
) -> None:
    manager = CheckpointManager(tmp_path)
    with manager.saving(1, {"iteration": 1}) as staging:
        saves = [on_ray[role].save_part(str(staging)) for role in ("actor", "critic")]
        for pending in saves:
            pending.result()
    checkpoint = manager.latest()
    assert checkpoint is not None
    alone = Actor(PLACE, spec(folders[0]), PPO)
    alone.restore(str(checkpoint.folder))
    together: dict[str, int] = {}
    for part in on_ray["actor"].fingerprints().result():
        together = {name: (together.get(name, 0) + part.get(name, 0)) % 2**64 for name in together | part}
    assert alone.fingerprints() == together
    assert alone.digest() == on_ray["actor"].digest().result()
    assert alone.engine.step_count == 1
    on_ray["actor"].restore(str(checkpoint.folder)).result()
