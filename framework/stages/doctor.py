"""`framework doctor`: what this installation can do, what is missing, and what that costs."""

import importlib.metadata
import platform
import shutil

from framework.core.errors import UsageError

_PACKAGES = {
    "ray": "needed by cluster=ray: PPO roles as separate workers",
    "transformers": "only tests and comparisons need it",
    "wandb": 'tracking=wandb; pip install "framework[wandb]"',
    "swanlab": 'tracking=swanlab; pip install "framework[swanlab]"',
    "tensorboard": 'tracking=tensorboard; pip install "framework[tensorboard]"',
    "hydra-optuna-sweeper": 'hydra/sweeper=optuna; pip install "framework[sweep]"',
    "datasets": 'data.train=[hub:OWNER/NAME]; pip install "framework[hub]"',
    "py3langid": 'languages in `data stats`; pip install "framework[curation]"',
    "hydra-submitit-launcher": 'hydra/launcher=submitit_slurm; pip install "framework[submitit]"',
    "deepspeed": 'parallel=zero1, zero2, zero3, zero3_offload; pip install "framework[deepspeed]"',
    "vllm": "faster rollouts on GPUs; the native generator works without",
    "flash-attn": "faster attention on GPUs; torch's own is used without",
}


def doctor(words: list[str]) -> int:
    """Print one line a component; returns 1 where something needed is missing."""
    if words:
        raise UsageError(f"doctor takes no words, got: {' '.join(words)}")
    lines = [("ok", "python", platform.python_version()), *_torch_lines(), _compiler_line("nvcc"), _compiler_line("cc")]
    lines += [_package_line(name, use) for name, use in _PACKAGES.items()]
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


def _package_line(name: str, use: str) -> tuple[str, str, str]:
    try:
        return "ok", name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent", name, use
