"""Datasets of the Hugging Face hub, by the `datasets` library, which knows subsets and splits; kept as .parquet.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and the caches' variables mean what they always do. Left out: datasets that load
by running code (law Files).
"""

import re
from pathlib import Path

from framework.core.config import digest
from framework.core.errors import DataError, UsageError

SCHEME = "hub:"
_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w.\[\]:%-]+))?")


def fetch(path: str) -> str:
    """The .parquet file of `hub:OWNER/NAME[:SUBSET][@SPLIT]`; the split is "train" where none is said."""
    matched = _NAME.fullmatch(path)
    if matched is None:
        raise DataError("a dataset of the hub is written hub:OWNER/NAME[:SUBSET][@SPLIT]", path)
    repository, subset, split = matched.groups()
    return fetch_parts(repository, subset, split or "train")


def fetch_parts(repository: str, subset: str | None, split: str, folder: str | None = None) -> str:
    """The .parquet file of one split of one subset (configuration), fetched where it is not there yet.

    `repository` may also be a local folder laid out as on the hub.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError('datasets of the hub need a package: pip install "framework[hub]"') from None
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(repository, name=subset, split=split, data_dir=folder)
    except Exception as error:  # the library raises what its parts raise: OSError, ValueError, its own
        what = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"cannot be had from the hub: {what}", f"{SCHEME}{repository}") from None
    key = digest([repository, subset, split, folder, loaded._fingerprint])
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "framework" / f"{key}.parquet"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        loaded.to_parquet(str(partial))
        partial.rename(kept)
    return str(kept)
