"""The actor: log-probs against a softmax by hand, the first ratio, staleness, checkpoint and export."""

from pathlib import Path

import pytest
import torch
from tiny import END, PLACE, PPO, TEMPERATURE, experience, generator_kwargs, policy_folder, prompts, spec

from framework.checkpoint.manager import CheckpointManager
from framework.core.errors import FrameworkError
from framework.core.records import Experience, Rollout, Scores, count, labels_of
from framework.engine.config import EngineConfig
from framework.models.config import LoraConfig
from framework.models.hub import load
from framework.objectives.ppo import clipped_policy_loss
from framework.workers import actor as actor_module
from framework.workers.actor import Actor, PolicyLoss, TokenPolicyLoss, policy_loss_of
from framework.workers.config import PpoConfig
from framework.workers.generator import Generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def rollout(folder: str) -> Rollout:
    """Twelve responses of the policy itself, version 0, some of them finished."""
    generator = Generator(PLACE, **generator_kwargs(folder))
    generator.load(list(load(folder).named_parameters()), version=0)
    drawn = generator.generate(prompts(6), samples=2, seed=1)
    assert 0 < drawn.finished.sum() < len(drawn)
    return drawn


@pytest.fixture
def actor(folder: str) -> Actor:
    worker = Actor(PLACE, spec(folder), PPO)
    worker.published(0)
    return worker


def by_hand(folder: str, rollout: Rollout) -> torch.Tensor:
    """log softmax(logits / temperature) of each response token, in fp64, one row at a time and without padding."""
    model = load(folder, torch.float64)
    result = torch.zeros(rollout.tokens.shape, dtype=torch.float64)
    for b, row in enumerate(rollout.tokens):
        length = int(rollout.token_mask[b].sum())
        with torch.no_grad():
            logits = model.logits(model(row[None, :length]))[0] / TEMPERATURE
        scores = logits.log_softmax(-1)
        for t in range(1, length):
            if rollout.response_mask[b, t]:
                result[b, t] = scores[t - 1, row[t]]
    return result


def test_log_probs_are_a_softmax_at_the_rollout_temperature(actor: Actor, folder: str, rollout: Rollout) -> None:
    log_probs = actor.log_probs(rollout)
    torch.testing.assert_close(log_probs.double(), by_hand(folder, rollout), rtol=0, atol=2e-5)
    assert (log_probs[~rollout.response_mask] == 0).all()


def test_strict_log_probs_equal_the_generators_bit_for_bit(actor: Actor, rollout: Rollout) -> None:
    assert torch.equal(actor.log_probs(rollout), rollout.log_probs)


@pytest.mark.parametrize("strict", [True, False])
def test_the_first_ratio_is_one_in_any_minibatch(folder: str, rollout: Rollout, strict: bool) -> None:
    worker = Actor(PLACE, spec(folder, engine=EngineConfig(strict=strict)), PPO)
    worker.published(0)
    batch = experience(rollout, worker.log_probs(rollout))
    shuffled = batch.select(torch.tensor([7, 2, 11, 0, 5, 9]))
    figures = worker.update(shuffled)
    assert figures["actor/ratio_deviation"] == 0.0 if strict else figures["actor/ratio_deviation"] < 1e-6
    assert figures["actor/clip_fraction"] == 0.0
    assert worker.update(shuffled)["actor/ratio_deviation"] > 1e-4


def test_an_update_makes_good_tokens_likelier(actor: Actor, rollout: Rollout) -> None:
    batch = experience(rollout, actor.log_probs(rollout))
    figures = actor.update(batch)
    gained = (actor.log_probs(rollout) - batch.old_log_probs) * batch.advantages
    assert gained.sum() > 0
    assert set(figures) >= {"actor/policy_loss", "actor/approx_kl", "actor/entropy", "actor/grad_norm", "actor/lr"}
    assert figures["actor/lr"] == pytest.approx(1e-2)


def test_an_update_does_not_depend_on_the_micro_batches(folder: str, rollout: Rollout) -> None:
    """Twelve rows in micro-batches of 4, and of 5 with the last one filled up: one gradient."""
    norms, after = [], []
    for micro_size in (4, 5):
        worker = Actor(PLACE, spec(folder, micro_size=micro_size), PPO)
        worker.published(0)
        norms.append(worker.update(experience(rollout, worker.log_probs(rollout)))["actor/grad_norm"])
        after.append(worker.log_probs(rollout))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=1e-4)


def test_the_policy_loss_and_the_entropy_bonus_by_hand() -> None:
    """Two response tokens of ratios e^0.1 and e^0.5 = 1.65 (clipped to 1.2), advantages 1 and 2; entropies 0.5 and 0.3.

    loss = -(1.10517 x 1 + 1.2 x 2) / 2 - 0.1 x (0.5 + 0.3) / 2 = -1.792585
    """
    mask = torch.tensor([[False, True, True, False]])
    rollout = Rollout(
        tokens=torch.tensor([[4, 5, END, 0]]),
        token_mask=torch.tensor([[True, True, True, False]]),
        response_mask=mask,
        positions=torch.tensor([[0, 1, 2, 0]]),
        log_probs=torch.zeros(1, 4),
        policy_version=torch.zeros(1, 4, dtype=torch.long),
        finished=torch.tensor([True]),
        row=torch.tensor([0]),
        sample=torch.tensor([0]),
    )
    zeros = torch.zeros(1, 4)
    old = torch.tensor([[0.0, -1.0, -2.0, 0.0]])
    batch = Experience(rollout, old, old, zeros, zeros, torch.tensor([[9.0, 1.0, 2.0, 9.0]]), zeros)
    scores = Scores(
        log_probs=torch.tensor([[-0.9, -1.5, 7.0, 7.0]]),  # at prediction positions: one to the left
        entropy=torch.tensor([[0.5, 0.3, 7.0, 7.0]]),
    )
    loss, metrics = PolicyLoss(PpoConfig(entropy_coefficient=0.1))(scores, batch, count(batch))
    assert float(loss) == pytest.approx(-1.792585, abs=1e-5)
    assert [float(x) for x in metrics["entropy"]] == pytest.approx([0.8, 2.0])
    assert [float(x) for x in metrics["clip_fraction"]] == [1.0, 2.0]


def test_the_loss_of_tokens_alone_is_that_of_rows(rollout: Rollout) -> None:
    mask, random = rollout.response_mask, torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(mask.shape, generator=random, dtype=torch.float64)

    batch, scores = Experience(rollout, *(noise() for _ in range(6))), Scores(noise(), noise())
    labels = batch.inputs().loss_mask
    by_rows = PolicyLoss(PpoConfig(entropy_coefficient=0.1))
    by_tokens = policy_loss_of(PpoConfig(entropy_coefficient=0.1))
    assert isinstance(by_tokens, TokenPolicyLoss)
    assert scores.entropy is not None
    loss, metrics = by_rows(scores, batch, count(batch))
    tokens = labels_of(batch)
    assert isinstance(tokens, Experience)
    same, others = by_tokens(scores.log_probs[labels], scores.entropy[labels], tokens, count(batch))
    torch.testing.assert_close(same, loss, rtol=1e-13, atol=0)
    for name, (total, weight) in metrics.items():
        torch.testing.assert_close(others[name][0], total, rtol=1e-13, atol=1e-13)
        assert others[name][1] == weight


def test_a_loss_that_does_not_say_so_is_given_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(policy_loss_of(PpoConfig(policy_loss="gspo"))) is PolicyLoss
    monkeypatch.delattr(clipped_policy_loss, "pointwise")
    assert type(policy_loss_of(PpoConfig())) is PolicyLoss


def test_wrong_old_log_probs_are_refused(actor: Actor, rollout: Rollout) -> None:
    """As they come from another temperature, or from a policy that has moved since."""
    batch = experience(rollout, actor.log_probs(rollout) * TEMPERATURE)
    with pytest.raises(FrameworkError, match=r"first update's mean \|ratio - 1\| is 0\.\d+, at most 0 is right"):
        actor.update(batch)


def test_stale_and_unproven_rollouts_are_refused(actor: Actor, rollout: Rollout) -> None:
    batch = experience(rollout, actor.log_probs(rollout))
    actor.published(3)
    with pytest.raises(FrameworkError, match="drawn by policy version 0, the one last published and proven is 3"):
        actor.update(batch)


def test_a_checkpoint_brings_back_the_same_bits(actor: Actor, folder: str, rollout: Rollout, tmp_path: Path) -> None:
    batch = experience(rollout, actor.log_probs(rollout))
    actor.update(batch)
    manager = CheckpointManager(tmp_path)
    with manager.saving(1, {}) as staging:
        actor.save_part(str(staging))
    again = Actor(PLACE, spec(folder), PPO)
    again.restore(str(manager.latest().folder))
    again.published(0)
    assert again.fingerprints() == actor.fingerprints()
    assert again.digest() == actor.digest() != Actor(PLACE, spec(folder), PPO).digest()
    assert actor.update(batch) == again.update(batch)
    assert again.fingerprints() == actor.fingerprints()


def test_export_writes_the_weights_as_they_are(actor: Actor, rollout: Rollout, tmp_path: Path) -> None:
    actor.update(experience(rollout, actor.log_probs(rollout)))
    actor.export(str(tmp_path), {"eos_token_id": END})
    again = Actor(PLACE, spec(str(tmp_path)), PPO)
    assert again.fingerprints() == actor.fingerprints()
    assert torch.equal(again.log_probs(rollout), actor.log_probs(rollout))


def test_an_adapter_is_continued_and_exported_both_ways(folder: str, rollout: Rollout, tmp_path: Path) -> None:
    ours = spec(folder, lora=LoraConfig(rank=8, dora=True), seed=1)
    actor, again = Actor(PLACE, ours, PPO), Actor(PLACE, ours, PPO)
    actor.published(0)
    again.published(0)
    batch = experience(rollout, actor.log_probs(rollout))
    actor.update(batch)
    manager = CheckpointManager(tmp_path / "checkpoints")
    with manager.saving(1, {}) as staging:
        actor.save_part(str(staging))
    again.restore(str(manager.latest().folder))
    assert actor.update(batch) == again.update(batch)
    assert actor.fingerprints() == again.fingerprints()
    assert actor.export(str(tmp_path / "model"), {"eos_token_id": END}, str(tmp_path / "adapter")) == ""
    for name in ("model", "adapter"):
        plain = Actor(PLACE, spec(str(tmp_path / name)), PPO)
        torch.testing.assert_close(plain.log_probs(rollout), actor.log_probs(rollout), rtol=0, atol=1e-5)
    assert (Actor(PLACE, spec(folder), PPO).log_probs(rollout) - actor.log_probs(rollout)).abs().max() > 1e-3


def test_weights_come_in_buckets_of_a_bounded_size(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list(actor.weights())) == 1
    monkeypatch.setattr(actor_module, "BUCKET_BYTES", 3000)
    buckets = list(actor.weights())
    assert len(buckets) > 3
    assert all(sum(t.nbytes for _, t in bucket[:-1]) < 3000 for bucket in buckets)
    names = [name for bucket in buckets for name, _ in bucket]
    assert names == list(actor.fingerprints())
    assert not any(t.requires_grad for bucket in buckets for _, t in bucket)
