"""Where a folder named in a recipe lies: on this machine's disk, or on object storage with a local folder, the spool.

A URL (s3://bucket/runs/sft) is worked on in its spool and mirrored by `tracking.remote`. Left out: the mirroring.
"""

import os
from pathlib import Path


def is_url(place: str) -> bool:
    """Whether a name is a URL: s3://bucket/runs/sft for a folder, hub:OWNER/NAME for data."""
    return "://" in place or place.startswith("hub:")


def local(place: str | Path) -> Path:
    """The folder itself, or the spool of a URL: s3://bucket/runs/sft -> $FRAMEWORK_SPOOL/s3/bucket/runs/sft.

    FRAMEWORK_SPOOL is ~/.cache/framework/spool where the environment does not say.
    """
    if not is_url(str(place)):
        return Path(place)
    scheme, _, rest = str(place).partition("://")
    root = os.environ.get("FRAMEWORK_SPOOL") or Path.home() / ".cache/framework/spool"
    return Path(root, scheme, *filter(None, rest.split("/")))
