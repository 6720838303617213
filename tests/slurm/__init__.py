"""Stand-ins for Slurm's commands, which a test puts on PATH: every node of a job is a process of this machine."""

import os
from pathlib import Path

_COMMANDS = Path(__file__).parent


def job_environment(cluster: Path, number: int, nodes: int) -> dict[str, str]:
    """What Slurm's batch script of job `number` would find set. The nodes are called 127.0.0.1, 127.0.0.2, ...: names
    that lead to this machine wherever it runs. `cluster` is the folder in which the stand-ins keep what they know."""
    names = [f"127.0.0.{node + 1}" for node in range(nodes)]
    cluster.mkdir(parents=True, exist_ok=True)
    return {
        "CLUSTER": str(cluster),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": ",".join(names),
        "SLURM_NNODES": str(nodes),
        "SLURM_CPUS_ON_NODE": "3",
        "PATH": f"{_COMMANDS}{os.pathsep}{os.environ['PATH']}",
    }
