"""The cluster of one run: opened once, it hands out the group of each role; in this process or on Ray."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.cluster.config import ClusterConfig, ClusterKind
from framework.cluster.group import Group, LocalGroup
from framework.cluster.local_ray import joined_ray, local_ray
from framework.cluster.placement import Pool, check_fit, pools
from framework.cluster.ray_group import RayGroup, Seat
from framework.core import runtime
from framework.core.errors import WorkerError


class Cluster(ABC):
    """Where workers are made."""

    @abstractmethod
    def group(self, role: str, worker_class: type, **kwargs: Any) -> Group:
        """The workers of `role`, each built as worker_class(runtime=..., **kwargs). Returns before they are up; see
        Group.ready."""

    @abstractmethod
    def standing(self) -> dict[str, dict[str, dict[int, str]]]:
        """Who stands where: role -> node -> rank -> device. Roles that share their seats are one, "actor, critic"."""


@contextlib.contextmanager
def open_cluster(
    config: ClusterConfig,
    worlds: Mapping[str, int],
    *,
    logs: Path,
    device: str = "auto",
    deterministic: bool | None = None,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Cluster]:
    """The cluster that `config` asks for, for roles of `worlds` = {role: ranks}; what it started ends with the block.

    Workers on Ray write to logs/ROLE-RANK.log. `prepare` (picklable) runs first in each of their processes, to import
    extensions.
    """
    if config.kind is ClusterKind.IN_PROCESS:
        yield _InProcess(runtime.start(device, None, deterministic, rank=0, world_size=1), tuple(worlds))
        return
    with _ray(config, worlds, device):
        settle = {"device": device, "deterministic": deterministic, "threads": config.threads}
        cluster = _OnRay(config, worlds, logs, settle, prepare)
        try:
            yield cluster
        finally:
            cluster.close()


class _InProcess(Cluster):
    def __init__(self, place: runtime.Runtime, roles: Sequence[str]):
        self._place, self._roles = place, roles

    def group(self, role: str, worker_class: type, **kwargs: Any) -> Group:
        return LocalGroup(role, worker_class, {"runtime": self._place, **kwargs})

    def standing(self) -> dict[str, dict[str, dict[int, str]]]:
        return {", ".join(self._roles): runtime.standing(self._place)}


class _OnRay(Cluster):
    def __init__(
        self,
        config: ClusterConfig,
        worlds: Mapping[str, int],
        logs: Path,
        settle: dict[str, Any],
        prepare: Callable[[], None] | None,
    ):
        self._config = config
        self._worlds = worlds
        self._logs = logs
        self._settle = settle
        self._prepare = prepare
        self._seats = _seats(config, worlds, settle["device"])
        self._groups: list[RayGroup] = []

    def group(self, role: str, worker_class: type, **kwargs: Any) -> Group:
        group = RayGroup(
            role,
            worker_class,
            kwargs,
            world=self._worlds[role],
            config=self._config,
            seat=self._seats[role],
            logs=self._logs,
            settle=self._settle,
            prepare=self._prepare,
        )
        self._groups.append(group)
        return group

    def standing(self) -> dict[str, dict[str, dict[int, str]]]:
        import ray

        names = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeName']})" for node in ray.nodes()}
        return {", ".join(seat.pool.roles): _standing(seat, names) for seat in self._seats.values()}

    def close(self) -> None:
        for group in self._groups:
            group.close()


def _ray(config: ClusterConfig, worlds: Mapping[str, int], device: str) -> contextlib.AbstractContextManager[None]:
    if config.address:
        return joined_ray(config.address)
    gpus = runtime.num_gpus() if runtime.choose_device(device).type == "cuda" else 0
    return local_ray(sum(pool.size * pool.cpus for pool in pools(config, worlds, gpus=0)), gpus)


def _seats(config: ClusterConfig, worlds: Mapping[str, int], device: str) -> dict[str, Seat]:
    """A seat for every role; refuses roles for which the cluster is too small."""
    import ray

    available = ray.cluster_resources()
    gpus = 1 if device != "cpu" and available.get("GPU", 0) else 0
    needed = pools(config, worlds, gpus)
    check_fit(needed, available)
    return {role: seat for pool in needed for seat in [_seat(pool, config)] for role in pool.roles}


def _seat(pool: Pool, config: ClusterConfig) -> Seat:
    import ray
    from ray.util.placement_group import placement_group

    group = placement_group(pool.bundles, strategy="PACK")
    if not group.wait(config.start_deadline_s):
        raise WorkerError(
            f"no room for {', '.join(pool.roles)} within {config.start_deadline_s:g} s: they need {pool.bundles}, "
            f"free are {ray.available_resources()}"
        )
    return Seat(pool, group)


def _standing(seat: Seat, names: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """Node -> rank -> device; which of a node's GPUs it will be, Ray says when the worker comes up."""
    from ray.util.placement_group import placement_group_table

    found: dict[str, dict[int, str]] = {}
    for rank, node in sorted(placement_group_table(seat.group)["bundles_to_node_id"].items()):
        found.setdefault(names[node], {})[rank] = "a GPU" if seat.pool.gpus else "cpu"
    return found
