"""From actor to generator: the weights, and the proof that they arrived (law Sync)."""

import time
from collections import deque

import torch

from framework.checkpoint.integrity import MODULUS
from framework.cluster.group import Group, Pending
from framework.core.errors import WorkerError, nearest
from framework.core.records import PromptBatch, Rollout

IN_FLIGHT = 2  # buckets on their way at a time: what the receiver's memory must hold besides its weights
# Mean |log-prob difference| on the canary where kernels may depend on a batch's shape; wrong weights are far beyond.
LOOSE_GAP = 0.05


def publish(actor: Group, generator: Group, version: int, canary: PromptBatch, strict: bool) -> dict[str, float]:
    """Give the generator the actor's weights as policy `version`, prove it, and tell the actor so.

    The proof is twofold: every rank of the generator holds, tensor by tensor, the bits that the actor's ranks hold
    together; and both give the tokens drawn for the `canary` prompts the same log-probs, exactly so with `strict`.
    Returns sync/seconds and sync/canary_gap (mean over tokens, nats). Raises WorkerError where a proof fails.
    """
    began = time.monotonic()
    send(actor, generator, version)
    compare(added(actor.fingerprints().result()), generator.fingerprints().result(), version)
    rollout = generator.generate(canary, samples=1, seed=0).result()
    gap = canary_gap(rollout, actor.log_probs(rollout).result())
    if gap > (0.0 if strict else LOOSE_GAP):
        raise WorkerError(
            f"version {version}: the generator's log-probs of its own tokens differ from the actor's by {gap:.3g} nats "
            f"on average, {0.0 if strict else LOOSE_GAP:g} is the most that equal weights explain"
        )
    actor.published(version).result()
    return {"sync/seconds": time.monotonic() - began, "sync/canary_gap": gap}


def send(actor: Group, generator: Group, version: int) -> None:
    """Stream the weights from worker to worker; a few buckets are on their way at a time."""
    under_way: deque[Pending[None]] = deque()
    for bucket in actor.weights():
        under_way.append(generator.load(bucket, version))
        if len(under_way) > IN_FLIGHT:
            under_way.popleft().result()
    for pending in under_way:
        pending.result()


def added(parts: list[dict[str, int]]) -> dict[str, int]:
    """The hash of each whole tensor from the hashes of the ranks' parts."""
    names = {name for part in parts for name in part}
    return {name: sum(part.get(name, 0) for part in parts) % MODULUS for name in names}


def compare(sent: dict[str, int], received: list[dict[str, int]], version: int) -> None:
    """Raise WorkerError unless every generator rank holds every tensor that was sent, bit for bit."""
    for rank, held in enumerate(received):
        missing = sorted(sent.keys() ^ held.keys())
        if missing:
            raise WorkerError(
                f"version {version}: actor and generator rank {rank} do not hold the same tensors: "
                f"{missing[0]} is on one side alone; {nearest(missing[0], sent.keys() & held.keys())}"
            )
        differing = [name for name in sorted(sent) if sent[name] != held[name]]
        if differing:
            raise WorkerError(
                f"version {version}: generator rank {rank} does not hold the actor's weights: {len(differing)} of "
                f"{len(sent)} tensors differ, {differing[0]} first ({held[differing[0]]:016x} for "
                f"{sent[differing[0]]:016x})"
            )


def canary_gap(rollout: Rollout, log_probs: torch.Tensor) -> float:
    """Mean |generator's - actor's| log-prob over the response tokens, in nats; both [B, T] at token positions."""
    mask = rollout.response_mask
    return float((rollout.log_probs - log_probs)[mask].abs().mean())
