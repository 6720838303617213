"""Law Sync: weights that did not arrive as they are, are noticed."""

from collections.abc import Sequence

import pytest
import torch
from tiny import PLACE, PPO, TEMPERATURE, experience, generator_kwargs, policy_folder, prompts, spec

from framework.cluster.group import LocalGroup
from framework.cluster.marks import same
from framework.core.errors import FrameworkError, WorkerError
from framework.generation.config import SamplingConfig
from framework.models.config import LoraConfig
from framework.workers import actor as actor_module
from framework.workers.actor import Actor
from framework.workers.generator import Generator
from framework.workers.publish import added, compare, publish
from framework.workers.reference import Reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def actor(folder: str) -> LocalGroup:
    return LocalGroup("actor", Actor, {"runtime": PLACE, "spec": spec(folder), "ppo": PPO})


def generator_of(folder: str, worker_class: type = Generator, **changes: object) -> LocalGroup:
    return LocalGroup("generator", worker_class, {"runtime": PLACE, **generator_kwargs(folder, **changes)})


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_published_apart_and_both_agree_to_the_bit(folder: str, dora: bool) -> None:
    lora = LoraConfig(rank=8, dora=dora)
    actor = LocalGroup("actor", Actor, {"runtime": PLACE, "spec": spec(folder, lora=lora, seed=1), "ppo": PPO})
    generator = generator_of(folder, lora=lora)
    reference = LocalGroup("reference", Reference, {"runtime": PLACE, "spec": spec(folder, optim=None)})
    for version in range(2):
        assert publish(actor, generator, version, prompts(2), strict=True)["sync/canary_gap"] == 0.0
        drawn = generator.generate(prompts(), samples=2, seed=version).result()
        old = actor.log_probs(drawn).result()
        assert torch.equal(drawn.log_probs, old)
        assert torch.equal(reference.log_probs(drawn).result(), old) == (version == 0)
        before = added(actor.fingerprints().result())
        actor.update(experience(drawn, old)).result()
        changed = {name for name, bits in added(actor.fingerprints().result()).items() if bits != before[name]}
        kinds = ({"lora_a"} if version else set()) | {"lora_b"} | ({"lora_m"} if dora else set())
        assert {name.rpartition(".")[2] for name in changed} == kinds


def test_after_publishing_both_agree_and_learning_may_go_on(
    actor: LocalGroup, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_module, "BUCKET_BYTES", 3000)  # so that there are several
    generator = generator_of(folder)
    for version in range(2):
        figures = publish(actor, generator, version, prompts(2), strict=True)
        assert figures["sync/canary_gap"] == 0.0
        rollout = generator.generate(prompts(4), samples=2, seed=version).result()
        assert (rollout.policy_version[rollout.response_mask] == version).all()
        old = actor.log_probs(rollout).result()
        assert torch.equal(old, rollout.log_probs)
        actor.update(experience(rollout, old)).result()
    publish(actor, generator, 2, prompts(2), strict=True)
    with pytest.raises(FrameworkError, match="policy version 1, the one last published and proven is 2"):
        actor.update(experience(rollout, old))


class Tampering(Generator):
    """One bit of one element is lost on the way."""

    @same
    def load(self, bucket: Sequence[tuple[str, torch.Tensor]], version: int) -> None:
        altered = [(name, tensor.clone()) for name, tensor in bucket]
        for name, tensor in altered:
            if name == "layers.1.mlp.up.weight":
                tensor.view(torch.int32)[3, 5] ^= 1
        self.native.load(altered, version)


def test_one_bit_that_changed_on_the_way_is_noticed(actor: LocalGroup, folder: str) -> None:
    with pytest.raises(
        WorkerError,
        match=r"version 7: generator rank 0 does not hold the actor's weights: 1 of \d+ tensors differ, "
        r"layers.1.mlp.up.weight first",
    ):
        publish(actor, generator_of(folder, Tampering), 7, prompts(2), strict=False)


def test_a_generator_that_computes_otherwise_fails_the_canary(actor: LocalGroup, folder: str) -> None:
    hotter = generator_of(folder, sampling=SamplingConfig(max_tokens=8, temperature=TEMPERATURE * 1.5))
    with pytest.raises(WorkerError, match="log-probs of its own tokens differ from the actor's"):
        publish(actor, hotter, 0, prompts(2), strict=False)


def test_hashes_of_parts_add_up_modulo_two_to_the_64() -> None:
    assert added([{"a": 2**64 - 1, "b": 5}, {"a": 3}]) == {"a": 2, "b": 5}


def test_tensors_on_one_side_alone_are_named() -> None:
    compare({"a": 1}, [{"a": 1}, {"a": 1}], version=0)
    with pytest.raises(WorkerError, match=r"generator rank 1 do not hold the same tensors: head.weight"):
        compare({"a": 1, "head.weight": 2}, [{"a": 1, "head.weight": 2}, {"a": 1}], version=0)
    with pytest.raises(WorkerError, match="generator rank 1 does not hold"):
        compare({"a": 1}, [{"a": 1}, {"a": 2}], version=0)
