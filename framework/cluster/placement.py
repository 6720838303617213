"""Which roles share which CPUs and GPUs: arithmetic only. `ray_group` turns a pool into a Ray placement group."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from framework.cluster.config import ClusterConfig
from framework.core.errors import UsageError


@dataclass(frozen=True)
class Pool:
    """Bundles of CPUs and GPUs, one a rank. Roles that share a pool take turns: rank r of each stands in bundle r.

    Example: actor and critic with two ranks each, colocated: Pool(("actor", "critic"), size=2, cpus=1.0, gpus=1.0).
    """

    roles: tuple[str, ...]
    size: int
    cpus: float
    gpus: float

    @property
    def bundles(self) -> list[dict[str, float]]:
        """In Ray's words."""
        bundle = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [dict(bundle) for _ in range(self.size)]

    @property
    def share(self) -> tuple[float, float]:
        """(CPUs, GPUs) of one role's rank; rounded down to Ray's grain of 1e-4, so that all shares fit."""
        return _part(self.cpus, len(self.roles)), _part(self.gpus, len(self.roles))


def pools(config: ClusterConfig, worlds: Mapping[str, int], gpus: float) -> list[Pool]:
    """The pools for roles of `worlds` ranks; `gpus` is what one rank needs, 0 or 1."""
    if config.colocate:
        return [Pool(tuple(worlds), max(worlds.values()), config.threads, gpus)]
    return [Pool((role,), size, config.threads, gpus) for role, size in worlds.items()]


def check_fit(needed: list[Pool], available: Mapping[str, float]) -> None:
    """Refuse roles that need more than there is."""
    for kind, wanted in (
        ("CPU", sum(pool.size * pool.cpus for pool in needed)),
        ("GPU", sum(pool.size * pool.gpus for pool in needed)),
    ):
        if wanted > available.get(kind, 0.0):
            raise UsageError(
                f"the roles need {wanted:g} {kind}s, the cluster has {available.get(kind, 0.0):g}; choose fewer "
                "cluster.workers, fewer cluster.threads, or cluster.colocate=true"
            )


def _part(amount: float, count: int) -> float:
    return math.floor(amount / count * 1e4) / 1e4
