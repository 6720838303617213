"""`framework doctor`: what this installation can do, what is missing, and what that costs; with cluster.workers=N, or
under torchrun and launch/slurm, whether every rank of a run would be fit.
"""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from pathlib import Path

from framework.core.errors import FrameworkError, UsageError

_MEET_S = 30.0
_PACKAGES = {
    "ray": "needed by cluster=ray: PPO roles as separate workers",
    "transformers": "only tests and comparisons need it",
    "wandb": 'tracking=wandb; pip install "framework[wandb]"',
    "swanlab": 'tracking=swanlab; pip install "framework[swanlab]"',
    "tensorboard": 'tracking=tensorboard; pip install "framework[tensorboard]"',
    "hydra-optuna-sweeper": 'hydra/sweeper=optuna; pip install "framework[sweep]"',
    "datasets": 'data.train=[hub:OWNER/NAME]; pip install "framework[hub]"',
    "bitsandbytes": 'lora.base=nf4; pip install "framework[quantised]"',
    "py3langid": 'languages in `data stats`; pip install "framework[curation]"',
    "hydra-submitit-launcher": 'hydra/launcher=submitit_slurm; pip install "framework[submitit]"',
    "deepspeed": 'parallel=zero1, zero2, zero3, zero3_offload; pip install "framework[deepspeed]"',
    "vllm": "faster rollouts on GPUs; the native generator works without",
}


def doctor(words: list[str]) -> int:
    """0 where all is well, 1 where something needed is missing or a rank is unfit."""
    asked = dict(word.partition("=")[::2] for word in words)
    if set(asked) - {"cluster.workers", "device"}:
        raise UsageError(f"doctor takes cluster.workers=N and device=NAME, got: {' '.join(words)}")
    device = asked.get("device", "auto")
    if "RANK" in os.environ:
        return examine(device)
    return _examine_here(device, asked["cluster.workers"]) if "cluster.workers" in asked else _show_installation()


def _examine_here(device: str, workers: str) -> int:
    """On ranks of this machine."""
    from framework.cluster.ranks import run_ranks
    from framework.core.runtime import num_gpus, places

    if workers != "auto" and not (workers.isdigit() and int(workers)):
        raise UsageError(f"cluster.workers={workers}: choose auto, or a number of processes from 1 on")
    world = int(workers) if workers != "auto" else 1 if device == "cpu" else max(1, num_gpus())
    places(device, world)
    with tempfile.TemporaryDirectory() as logs:
        run_ranks("doctor", examine, device, world, Path(logs))
    return 0


def examine(device: str) -> int:
    """On this rank of several. One prints what all are like, or raises what is wrong; the others return 1 then."""
    from framework.cluster.checkup import Seat, check_ranks
    from framework.core.runtime import check_devices, choose_device, meet, node

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_devices(device, int(os.environ["LOCAL_WORLD_SIZE"]))
    place = choose_device(device, int(os.environ["LOCAL_RANK"]))
    verdict = check_ranks(Seat(rank, node(), str(place)), world, meet(_MEET_S))
    if verdict.speaks and not verdict.fit:
        raise FrameworkError("not every rank is fit:\n" + "\n".join(verdict.lines))
    if verdict.speaks:
        print("\n".join(verdict.lines))
    return int(not verdict.fit)


def _show_installation() -> int:
    """Print one line a component."""
    lines = [("ok", "python", platform.python_version()), *_torch_lines(), _compiler_line("nvcc"), _compiler_line("cc")]
    lines += [_package_line(name, use) for name, use in _PACKAGES.items()]
    lines += _operator_lines()
    for state, name, text in lines:
        print(f"{state:<8}{name:<22}{text}")
    print()
    import cuda_ext

    print(cuda_ext.explain())
    return int(any(state == "MISSING" for state, _, _ in lines))


def _torch_lines() -> list[tuple[str, str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("MISSING", "torch", f"{error}; pip install torch")]
    import torch.distributed as dist

    from framework.core.driver import find_driver
    from framework.core.runtime import choose_device, num_gpus

    try:
        device = f"{choose_device('auto')}, {num_gpus()} GPUs"
    except UsageError as error:
        return [("ok", "torch", torch.__version__), ("MISSING", "GPU", str(error))]
    backends = [
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    ]
    return [
        ("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("ok", "device", device),
        ("ok", "driver", str(driver)) if (driver := find_driver()) else ("absent", "driver", "no NVIDIA GPU here"),
        ("ok", "collectives", ", ".join(backends)),
    ]


def _compiler_line(name: str) -> tuple[str, str, str]:
    path = shutil.which(name)
    return ("ok", name, path) if path else ("absent", name, "no compiled ops; the reference implementations run")


def _operator_lines() -> list[tuple[str, str, str]]:
    """Libraries whose operators `ops` can ask for."""
    from cuda_ext import apex
    from cuda_ext.attention import flash

    attention, norm, optimizer = flash.explain(), apex.why_not("norm"), apex.why_not("optimizer")
    found = "ops.norm=apex and ops.optimizer=apex can be had on a GPU"
    return [
        ("absent", "flash-attn", "faster attention on GPUs; torch's own is used without")
        if attention == flash.ABSENT
        else ("ok", "flash-attn", attention),
        ("absent", "NVIDIA apex", norm or optimizer) if norm or optimizer else ("ok", "NVIDIA apex", found),
    ]


def _package_line(name: str, use: str) -> tuple[str, str, str]:
    try:
        return "ok", name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent", name, use
