"""Metrics on their way from micro-batches to figures: (sum, weight) pairs that add up; the mean is taken last."""

import torch

from framework.core.records import Metrics
from framework.parallel.collectives import Ranks


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Sums and weights added name by name, in fp64."""
    merged = dict(a)
    for name, pair in b.items():
        total, weight = (x.detach().double() for x in pair)
        if name in merged:
            total, weight = merged[name][0] + total, merged[name][1] + weight
        merged[name] = (total, weight)
    return merged


def reduce_over(ranks: Ranks, metrics: Metrics) -> Metrics:
    """Summed over `ranks` in one collective. Every rank has the same names: they come from one loss."""
    if not metrics:
        return {}
    names = sorted(metrics)
    table = torch.stack([torch.stack(metrics[name]) for name in names])
    return {name: (pair[0], pair[1]) for name, pair in zip(names, ranks.sum(table, "the metrics"), strict=True)}


def means(metrics: Metrics) -> dict[str, float]:
    """name -> sum / weight; a metric that nothing counted towards is left out."""
    return {name: float(total / weight) for name, (total, weight) in metrics.items() if weight > 0}
