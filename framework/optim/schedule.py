"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from framework.optim.config import OptimConfig, Schedule


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of update number `step` (from 0) out of `total_steps`.

    Warm-up rises linearly to `lr` and reaches it in its last step: lr (step+1)/warmup, so that no update is spent at
    zero (transformers' schedules start at 0: they stand one step behind during warm-up and agree from there on). Then
    the shape falls towards `final_lr` times `lr`, which it would reach one step after the last.
    """
    warmup = num_steps(config.warmup, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (config.final_lr + (1 - config.final_lr) * _height(config, step, total_steps, warmup))


def num_steps(amount: float, total_steps: int) -> int:
    """A share of all steps when below 1, else a number of steps; at most all of them."""
    return min(total_steps, round(amount * total_steps) if amount < 1 else round(amount))


def _height(config: OptimConfig, step: int, total_steps: int, warmup: int) -> float:
    """From 1 at the end of warm-up down to 0 at `total_steps`."""
    left = max(0, total_steps - step)
    if config.schedule is Schedule.CONSTANT:
        return 1.0
    if config.schedule is Schedule.WSD:
        decay = min(num_steps(config.decay, total_steps), total_steps - warmup)
        return min(1.0, left / max(1, decay))
    share = left / max(1, total_steps - warmup)
    return share if config.schedule is Schedule.LINEAR else 0.5 * (1 - math.cos(math.pi * share))
