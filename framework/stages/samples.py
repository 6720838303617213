"""What a finished model says: the recipe's tasks run against it, with answers kept for the report."""

from functools import partial
from typing import Any

from framework.core.records import Tokenizer
from framework.evaluation.config import EvaluationConfig
from framework.evaluation.runner import TaskResult, run_task
from framework.generation.config import SamplingConfig
from framework.generation.text import load_generator
from framework.stages.config import EvaluateRun, TrainingRun
from framework.stages.job import Job
from framework.tasks.task import get
from framework.tracking.progress import Progress

Figures = dict[str, float]
_SHOWN = 6  # answers of a task kept for the report


def run_tasks(job: Job, config: TrainingRun | EvaluateRun, folder: str) -> Figures:
    """Run every task of the recipe against the model in `folder`; on the main rank alone. A stop forgets them all."""
    if not (config.evaluation.tasks and job.runtime.is_main):
        return {}
    pause = partial(job.stop.leave, "while running tasks")
    generator, tokenizer = load_generator(folder, config.generation, config.device, pause)
    results = [
        run(name, generator, tokenizer, config.sampling, config.evaluation, config.tracking.progress)
        for name in config.evaluation.tasks
    ]
    figures: Figures = {}
    for name, result in zip(config.evaluation.tasks, results, strict=True):
        figures |= as_figures(result)
        job.learned(f"{name.replace('_', ' ')} (of {result.n})", result.score)
        for answer in result.answers[:_SHOWN]:
            asked = tokenizer.decode(tokenizer.encode(answer.prompt))  # as a person reads it, without the template
            record = {"prompt": asked, "response": answer.response, "score": answer.score}
            job.folder.sample(0, {"task": name, **record})
        job.facts["example"] = example_prompt(name, config.evaluation) or job.facts.get("example", "")
    return figures


def run(
    name: str,
    generator: Any,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    evaluation: EvaluationConfig,
    progress: bool = False,
) -> TaskResult:
    """One task against anything that generates."""
    task = get(name)
    total = len(task.examples(evaluation.part)[: evaluation.limit or None])
    with Progress(name, total, "examples", enabled=progress) as bar:
        return run_task(
            task, generator, tokenizer, sampling, part=evaluation.part, limit=evaluation.limit, progress=bar
        )


def example_prompt(name: str, evaluation: EvaluationConfig) -> str:
    """What a user would type to be given the task's first example; empty for tasks without a prompt."""
    task = get(name)
    messages = task.prompt(task.examples(evaluation.part)[0])
    return messages[-1].content if messages else ""


def as_figures(result: TaskResult) -> Figures:
    """{"verse_form": 0.93, "verse_form/error": 0.02, "verse_form/finished": ...}"""
    return {result.name: result.score, f"{result.name}/error": result.error}
