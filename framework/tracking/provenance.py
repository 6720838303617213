"""What a result was made with: package versions, machine, and the commit of the code where there is one."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from framework import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "ray", "hydra-core")


def provenance() -> dict[str, Any]:
    """{"versions": {package: version}, "machine": ..., "commit": of the checkout, marked "-dirty" where changed}."""
    return {"versions": _versions(), "machine": f"{platform.system()} {platform.machine()}", "commit": _commit()}


def _versions() -> dict[str, str]:
    versions = {"framework": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """Of the checkout that this file stands in; None where it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
