"""What a step of `framework sft` costs beside the bare model: the same batches, already in memory, through the same
module in the barest loop: forward, loss, backward, clip, update. The rest is overhead: loading, counting, logging.

The bare loop runs twice, with our AdamW and with torch's fused one, which rounds differently.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from framework.core import runtime
from framework.core.records import count
from framework.data.loader import Loader
from framework.models.hub import read_folder
from framework.models.init import fill
from framework.models.scorer import Scorer
from framework.models.transformer import Transformer
from framework.optim.adamw import AdamW
from framework.optim.config import OptimConfig
from framework.stages.pretrain import token_loss
from tests.benchmarks.contest import Laps, Run, compete, options, report
from tests.benchmarks.sft import BETA2, CLIP, DECAY, EPS, LR, Task, facts, our_rows, ours, prepared, token_counts


def bare(place: Path, laps: Laps, task: Task, build: Callable[[Scorer], Callable[[], Any]]) -> None:
    """A loop over ready batches, as a notebook would have it."""
    runtime.start("cpu", task.threads)
    model, read, _ = read_folder(task.model)
    with torch.device("meta"):
        body = Transformer(model)
    scorer = Scorer(fill(body, read))
    loader = Loader(our_rows(task), task.rows, seed=0)
    batches = [loader.batch(step) for step in range(task.total_steps)]
    update = build(scorer)
    laps.ready({"trained tokens an epoch": loader.rows.num_tokens}, {"first loss": held_out_loss(scorer, task)})
    for step, batch in enumerate(batches):
        loss_of(scorer, batch).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), CLIP)
        update()
        scorer.zero_grad(set_to_none=True)
        if (step + 1) % task.steps == 0:
            lap = map(token_counts, batches[step + 1 - task.steps : step + 1])
            laps.done(*map(sum, zip(*lap, strict=True)))


def loss_of(scorer: Scorer, batch: Any) -> torch.Tensor:
    """Cross-entropy over the batch's own count."""
    loss, _ = scorer(batch, token_loss=lambda log_probs, _, rows: token_loss(log_probs, None, rows, count(batch)))
    return loss


def held_out_loss(scorer: Scorer, task: Task) -> float:
    """Over all held-out rows at once."""
    rows = our_rows(task, "held")
    with torch.no_grad():
        return float(loss_of(scorer, next(Loader(rows, len(rows), 0).evaluation_batches())))


def our_adamw(scorer: Scorer) -> Callable[[], None]:
    """The engine's update at a constant rate."""
    parameters = dict(scorer.named_parameters())
    tensors = {name: p.detach() for name, p in parameters.items()}
    shapes = {name: p.shape for name, p in parameters.items()}
    optimizer = AdamW(tensors, shapes, OptimConfig(lr=LR, eps=EPS, weight_decay=DECAY, beta1=0.9, beta2=BETA2))
    return lambda: optimizer.step({name: p.grad for name, p in parameters.items()}, LR)  # type: ignore[misc]


def fused_adamw(scorer: Scorer) -> Callable[[], Any]:
    """torch's fastest."""
    settings: dict[str, Any] = {"lr": LR, "eps": EPS, "weight_decay": DECAY, "betas": (0.9, BETA2), "fused": True}
    return torch.optim.AdamW(scorer.parameters(), **settings).step


def contestants(task: Task) -> dict[str, Run]:
    """Ours first."""
    return {
        "framework sft": functools.partial(ours, task=task),
        "bare loop": functools.partial(bare, task=task, build=our_adamw),
        "bare loop, torch's fused AdamW": functools.partial(bare, task=task, build=fused_adamw),
    }


def main(argv: list[str] | None = None) -> None:
    """Run it; a factor of 0.97 is an overhead of 3 %."""
    sizes = {"rounds": 20, "steps": 4, "rows": 16, "max_tokens": 128, "width": 128, "layers": 4, "threads": 1}
    args = options(__doc__ or "", argv, **sizes, samples=15000)
    with tempfile.TemporaryDirectory() as scratch:
        task = prepared(Path(scratch), args)
        report("A step", compete(contestants(task), task.place, task.rounds), facts(task, args), args.out)


if __name__ == "__main__":
    main()
