"""Understanding: texts with labels in, a classifier or a regressor out (Devlin et al. 2018, section 4).

A head reads the state of one token: an encoder's first one through BERT's pooler, a decoder's last one, the end token
(Radford et al. 2018, section 3.2). Left out: several labels a text, and labelling new texts: model/ is a
*ForSequenceClassification that transformers' pipeline runs.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from framework.core.errors import UsageError
from framework.core.records import ClassBatch, Counts, Metrics, Rows, Scores
from framework.core.runtime import apart
from framework.data.classify import Targets, open_rows, read_targets
from framework.models.hub import locate, read_folder
from framework.objectives.classification import classification_loss, regression_loss
from framework.stages.baselines import label_guess
from framework.stages.config import ClassifyRun
from framework.stages.job import Job, Run, located, open_job
from framework.stages.training import Figures, Start, fit, open_both, open_start
from framework.stages.training import Rows as BothParts


def label_loss(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
    """Of the head's outputs, scores.classes [B, C]: cross-entropy where labels are classes, else squared error."""
    assert isinstance(rows, ClassBatch)
    assert scores.classes is not None
    if rows.label.is_floating_point():
        return regression_loss(scores.classes.squeeze(-1), rows.label, counts.sequences)
    return classification_loss(scores.classes, rows.label, counts.sequences)


def run(config: ClassifyRun) -> Run:
    """Train on data.train, measure on unseen texts beside a guess that reads no text, export model/."""
    with open_job(config, {"init_from": config.init_from}) as job:
        if job.finished:
            return job.result()
        start = open_start(config, job.runtime.world_size)
        with apart(job.stop, "while reading labels") as point:
            targets = read_targets(located(config.data), config.classify, point)
        refuse_other_head(config.init_from, targets)
        rows = open_both(job, config, partial(open_rows, targets, start.model.token_types), start.tokenizer)
        job.say(targets.told())
        names = partial(config_words, targets, start)
        figures = fit(job, config, start, rows, label_loss, num_classes=targets.size, describe=names)
        if rows.valid is not None:
            figures |= report(job, targets, rows, figures)
        return job.finish(figures)


def report(job: Job, targets: Targets, rows: BothParts, figures: Figures) -> Figures:
    """The row of the closing table, beside what needs no text; returns the figures that this adds."""
    assert rows.valid is not None
    guess = label_guess(rows.train, rows.valid, len(targets.words), job.stop)
    if targets.words:
        what = f"unseen texts right (the commonest class alone: {guess:.3g})"
        job.learned(what, figures["valid/accuracy"], figures["valid/accuracy/before"])
        return {"baseline/majority_accuracy": guess}
    rmse, before = (math.sqrt(figures[f"valid/loss{when}"]) for when in ("", "/before"))
    job.learned(f"RMSE on unseen texts (the mean alone: {math.sqrt(guess):.3g})", rmse, before)
    return {"valid/rmse": rmse, "valid/rmse/before": before, "baseline/mean_rmse": math.sqrt(guess)}


def config_words(targets: Targets, start: Start, figures: Mapping[str, float]) -> dict[str, Any]:
    """What config.json says of the labels. A pad token that is none of a text's own goes with it: by it transformers
    finds the last token of a padded row."""
    tokenizer = start.tokenizer
    words: dict[str, Any] = {"problem_type": "single_label_classification" if targets.words else "regression"}
    if targets.words:
        words["id2label"] = {str(number): word for number, word in enumerate(targets.words)}
        words["label2id"] = {word: number for number, word in enumerate(targets.words)}
    return words | ({"pad_token_id": tokenizer.start_id} if tokenizer.start_id != tokenizer.end_id else {})


def refuse_other_head(folder: str, targets: Targets) -> None:
    """A folder that has a head already goes on with it: for the same classes in their order."""
    head = read_folder(folder)[2].get("class_head.weight")
    if head is None:
        return
    if head[0] != targets.size:
        raise UsageError(
            f"init_from={folder} is a classifier of {head[0]} outputs, the data need {targets.size}; start from the "
            "model that it was made from, or name all its classes in classify.labels"
        )
    known = _named_classes(locate(folder) / "config.json")
    if targets.words and known and known != targets.words:
        raise UsageError(
            f"init_from={folder} is a classifier of {', '.join(known)}, the data have {', '.join(targets.words)}; if "
            f"they are the same, say classify.labels=[{','.join(known)}]"
        )


def _named_classes(config: Path) -> tuple[str, ...]:
    """The classes that a config.json names in their order; () where it only numbers them, or is an adapter's."""
    theirs = json.loads(config.read_text(encoding="utf-8")).get("id2label", {}) if config.is_file() else {}
    names = tuple(str(name) for _, name in sorted(theirs.items(), key=lambda entry: int(entry[0])))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names
