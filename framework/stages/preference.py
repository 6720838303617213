"""Preference learning without a reward model: pairs in, a better aligned model out (Rafailov et al. 2023)."""

from functools import partial

import torch
from torch import Tensor

from framework.core.records import Counts, Metrics, PreferenceBatch, Rows, Scores
from framework.data.preference import open_rows
from framework.objectives.preference import answer_loss, dpo_loss
from framework.stages.config import DpoConfig, PreferenceRun
from framework.stages.job import Run, open_job
from framework.stages.reference import answer_log_probs, with_reference
from framework.stages.samples import run_tasks
from framework.stages.training import fit, open_both, open_start


def preference_loss(scores: Scores, rows: Rows, counts: Counts, *, dpo: DpoConfig) -> tuple[Tensor, Metrics]:
    """What the recipe asks for of `objectives.preference`, on rows that carry the reference's log-probs.

    Beside its metrics: `ranking_accuracy`, the share of pairs whose chosen answer is the likelier one, whatever the
    reference says (Chen et al. 2024)."""
    assert isinstance(rows, PreferenceBatch)
    assert rows.reference is not None
    summed = answer_log_probs(scores)
    lengths = rows.inputs().loss_mask.sum(dim=1).view(2, -1).T  # [B, 2]
    scale = lengths if dpo.averages else torch.ones_like(lengths)
    (chosen, rejected), (was_chosen, was_rejected) = (summed / scale).unbind(1), (rows.reference / scale).unbind(1)
    loss, metrics = dpo_loss(
        chosen,
        rejected,
        was_chosen,
        was_rejected,
        beta=dpo.beta,
        num_pairs=counts.pairs,
        kind=dpo.kind.value,
        label_smoothing=dpo.label_smoothing,
    )
    likelier = (chosen > rejected).to(summed.dtype)
    metrics["ranking_accuracy"] = likelier.sum(), summed.new_tensor(len(likelier))
    if dpo.sft_coefficient:
        own, figures = answer_loss(summed[:, 0], lengths[:, 0], counts.pairs)
        loss = loss + dpo.sft_coefficient * own
        (total, weight), (nats, _) = metrics["loss"], figures["sft_loss"]
        metrics |= figures | {"loss": (total + dpo.sft_coefficient * nats, weight)}
    return loss, metrics


def run(config: PreferenceRun) -> Run:
    """Ask the starting model about the pairs once, train on data.train, validate, export model/, run the tasks."""
    with open_job(config, {"init_from": config.init_from}) as job:
        if job.finished:
            return job.result()
        start = open_start(config, job.runtime.world_size)
        rows = open_both(job, config, open_rows, start.tokenizer)
        loss = partial(preference_loss, dpo=config.dpo)
        figures = fit(job, config, start, rows, loss, ready=partial(with_reference, job, config))
        if rows.valid is not None:
            likelier = "valid/ranking_accuracy"
            job.learned(
                "unseen pairs whose better answer is likelier", figures[likelier], figures[f"{likelier}/before"]
            )
            job.learned("unseen pairs that training moved the right way", figures["valid/accuracy"])
        figures |= run_tasks(job, config, str(config.folder / "model"))
        return job.finish(figures)
