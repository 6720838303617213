"""Where a folder named in a recipe lies: on this machine's disk, or on object storage with a local folder, the spool.

A URL (s3://bucket/runs/sft) is worked on in its spool and mirrored by `tracking.remote`. Left out: the mirroring.
"""

import os
from pathlib import Path


def is_url(place: str) -> bool:
    """Whether a folder is named by a URL that fsspec understands."""
    return "://" in place


def local(place: str | Path) -> Path:
    """The folder itself, or the spool of a URL: s3://bucket/runs/sft -> $FRAMEWORK_SPOOL/s3/bucket/runs/sft.

    FRAMEWORK_SPOOL is ~/.cache/framework/spool where the environment does not say.
    """
    return _below("", place) if is_url(str(place)) else Path(place)


def watched(url: str) -> Path:
    """Where a run is looked at that another process, maybe one of this machine, is working on."""
    return _below(".watched", url)


def _below(folder: str, url: str | Path) -> Path:
    scheme, _, rest = str(url).partition("://")
    root = os.environ.get("FRAMEWORK_SPOOL") or Path.home() / ".cache/framework/spool"
    return Path(root, folder, scheme, *filter(None, rest.split("/")))
