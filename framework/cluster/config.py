"""Where workers run and how long anyone waits for them."""

from dataclasses import dataclass

from framework.core.config import Choice, require


class ClusterKind(Choice):
    """Where workers live."""

    IN_PROCESS = "in_process"  # direct calls in this process; a breakpoint works
    RAY = "ray"


@dataclass(frozen=True)
class RanksConfig:
    """How many processes of this machine train together. torchrun's world, where there is one, stands instead."""

    workers: int | str = "auto"  # auto = one a GPU that torch sees; one on a CPU and under parallel=single
    deadline_s: float = 600.0  # of every collective, and of any phase in which ranks may wait for one another
    start_deadline_s: float = 180.0  # until all nodes of a Slurm job must have come

    def __post_init__(self) -> None:
        asked = self.workers
        known = asked == "auto" if isinstance(asked, str) else asked >= 1
        require(known, f"cluster.workers={asked}: choose auto, or a number of processes from 1 on")
        require(self.deadline_s > 0, f"cluster.deadline_s={self.deadline_s} must be positive")
        require(self.start_deadline_s > 0, f"cluster.start_deadline_s={self.start_deadline_s} must be positive")


@dataclass(frozen=True)
class ClusterConfig:
    """`address` empty starts a private Ray on this machine and shuts it down again; else that Ray is joined."""

    kind: ClusterKind = ClusterKind.IN_PROCESS
    address: str = ""
    workers: int = 1  # ranks of each training role (actor, critic, reference, reward)
    colocate: bool = False  # all roles share one pool; false: each role its own
    threads: int = 1  # torch threads of each worker
    deadline_s: float = 600.0  # of every remote call
    start_deadline_s: float = 180.0  # until all workers must have come up

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"cluster.workers={self.workers} must be at least 1")
        require(self.deadline_s > 0 and self.start_deadline_s > 0, "cluster deadlines must be positive")
