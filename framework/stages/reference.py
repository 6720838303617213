"""What the reference says of the pairs: asked of the starting weights once, before the first step, and kept in the run
folder, so that training holds one model and a continued run reads what the first attempt was told.

Pairs are asked about in the run's own batches, by the engine that will train: under one layout the first step's policy
is the reference bit for bit, and its loss ln 2. Left out: PPO's reference, which answers during training (`workers`);
keeping what was found when asking is broken off.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.core.config import digest
from framework.core.errors import FrameworkError
from framework.core.records import PreferenceBatch, Scores
from framework.core.runtime import agreed, heed, largest
from framework.data import preference
from framework.data.loader import Array, RowSource, stream
from framework.engine.config import Precision
from framework.engine.protocol import Engine
from framework.stages.config import PreferenceRun
from framework.stages.job import Job
from framework.stages.training import Rows
from framework.tracking.atomic import replace_bytes
from framework.tracking.progress import Progress

FILE = "reference.safetensors"  # in the run folder: a table a part of the data
Tables = dict[str, Tensor]  # part -> [rows, 2] log-probs of chosen and rejected; minus infinity where nobody asked yet


def answer_log_probs(scores: Scores) -> Tensor:
    """[B, 2]: log-probability of each pair's answers, chosen and rejected, in nats. scores.log_probs [2B, T] holds the
    chosen rows, then the rejected ones, zero outside the answers."""
    return scores.log_probs.sum(dim=1).view(2, -1).T


def with_reference(job: Job, config: PreferenceRun, engine: Engine, rows: Rows) -> Rows:
    """`rows` that carry the log-probs under the weights that `engine` holds, which must be those of the start: of every
    pair that the run will see. Found in the run folder, or made. Collective."""
    sources = {"train": rows.train} | ({"valid": rows.valid} if rows.valid is not None else {})
    order = {part: _order(config, part, source) for part, source in sources.items()}
    key = digest({part: source.fingerprint for part, source in sources.items()})
    tables = _find(job, config, key) or _unasked(config, sources)
    unknown = [part for part in sources if len(_unknown(tables[part], order[part]))]
    for part in unknown:
        _ask(job, config, engine, sources[part], tables[part], order[part], f"reference, {part} pairs")
    if unknown:
        _check(tables, order)
        _keep(job, config, tables, key)
    pairs = {part: preference.with_reference(source, tables[part]) for part, source in sources.items()}
    return Rows(pairs["train"], pairs.get("valid"))


def _order(config: PreferenceRun, part: str, source: RowSource) -> Array:
    """Row numbers in the order in which the run comes to them: a stream's steps, or a validation."""
    if part == "valid":
        return np.arange(len(source))
    steps = config.train.total_steps(len(source), config.batch.size)
    return stream(source, config.seed, np.arange(steps * config.batch.size))


def _unknown(table: Tensor, order: Array) -> Array:
    unknown: Array = order[torch.isinf(table[torch.from_numpy(order)]).any(dim=1).numpy()]
    return unknown


def _unasked(config: PreferenceRun, sources: dict[str, RowSource]) -> Tables:
    dtype = torch.float64 if config.engine.precision is Precision.FP64 else torch.float32
    return {part: torch.full((len(source), 2), -torch.inf, dtype=dtype) for part, source in sources.items()}


def _ask(
    job: Job, config: PreferenceRun, engine: Engine, source: RowSource, table: Tensor, order: Array, what: str
) -> None:
    """Fill `table` for all rows of `order`, each as the first batch that holds it has it."""
    found = torch.full_like(table, -torch.inf)
    new = torch.isinf(table).any(dim=1).numpy()
    shown = config.tracking.progress and job.runtime.is_main
    total = left = len(np.unique(_unknown(table, order)))
    with Progress(what, total=total, unit="pairs", enabled=shown) as progress:
        for whole, mine in _batches(order, config.batch.size, engine.data_rank, engine.data_size):
            if not new[whole].any():
                continue
            heed(job.stop, "while the reference was asked about the pairs")
            pairs = source.rows(mine)
            assert isinstance(pairs, PreferenceBatch)
            said = answer_log_probs(engine.infer(pairs))
            fresh = new[mine]
            found[mine[fresh]] = said[fresh].to(found.dtype)
            left -= len(np.unique(whole[new[whole]]))
            new[whole] = False
            progress(total - left)
    found = torch.where(torch.isfinite(found), found, -torch.inf)
    table.copy_(torch.maximum(table, largest(found, "the gathering of the reference's log-probs")))


def _batches(order: Array, size: int, rank: int, ranks: int) -> Iterator[tuple[Array, Array]]:
    """(the row numbers of a batch, this data rank's part) one after another. All ranks get parts of equal sizes; where
    the last rows do not divide, some come twice."""
    for start in range(0, len(order), size):
        whole = order[start : start + size]
        share = -(-len(whole) // ranks)
        yield whole, whole[np.minimum(rank * share + np.arange(share), len(whole) - 1)]


def _check(tables: Tables, order: dict[str, Array]) -> None:
    for part, table in tables.items():
        bad = _unknown(table, order[part])
        if len(bad):
            raise FrameworkError(
                f"the model of init_from gives pair {bad[0]} of data.{part} a log-probability that is not finite; "
                "start from a sound model, or in a wider engine.precision"
            )


def _keep(job: Job, config: PreferenceRun, tables: Tables, key: str) -> None:
    """Write the file, whole or not at all; no rank goes on before it is there."""
    job.folder.require_own()
    if job.runtime.is_main:
        replace_bytes(config.folder / FILE, safetensors.torch.save(tables, {"rows": key}))
    agreed(0)


def _find(job: Job, config: PreferenceRun, key: str) -> Tables | None:
    """What an earlier attempt was told about these rows; recipe and weights are equal in one run folder."""
    path = config.folder / FILE
    if not agreed(int(job.runtime.is_main and _is_about(path, key))):
        return None
    return safetensors.torch.load_file(path)


def _is_about(path: Path, key: str) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("rows") == key
    except (OSError, SafetensorError):
        return False
