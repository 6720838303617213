"""Whose operators a run computes with (`ops`): refused where they are not here, before anything starts; settled in each
process that computes.

Left out: what an engine or a layout cannot have (`engine.config`), and what a single call cannot (`cuda_ext.dispatch`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from cuda_ext import dispatch
from cuda_ext.attention import flash
from framework.core.errors import UsageError
from framework.stages.config import PpoRun, RunConfig
from framework.stages.extensions import load_same


def wanted_ops(config: RunConfig) -> dict[str, str]:
    """Kind of operator -> whose; {} for a stage that runs no model."""
    ops = getattr(config, "ops", None)
    return {} if ops is None else {entry.name: str(getattr(ops, entry.name)) for entry in fields(ops)}


def check_ops(config: RunConfig) -> None:
    """UsageError where something is wanted that this machine cannot run. Of workers on other machines they say it."""
    if not (isinstance(config, PpoRun) and config.cluster.address):
        _check(wanted_ops(config), config.device)


def settle_worker(
    extensions: Sequence[str], digests: Mapping[str, str], wanted: Mapping[str, str], device: str
) -> None:
    """First of all in a worker: its extensions, which must be the controller's, and whose operators it takes."""
    load_same(extensions, digests)
    _check(wanted, device)
    dispatch.prefer(**wanted)


def ops_lines(config: RunConfig) -> list[str]:
    """For `explain`: a line a kind that the recipe names, and why it would be refused."""
    named = {kind: choice for kind, choice in wanted_ops(config).items() if choice != "auto"}
    try:
        _check(named, config.device)
    except UsageError as error:
        return [str(error)]
    return [f"ops.{kind}={choice}: can run here" for kind, choice in named.items()]


def _check(wanted: Mapping[str, str], device: str) -> None:
    named = {kind: choice for kind, choice in wanted.items() if choice in ("kernel", "apex", "flash")}
    if not named:
        return
    from framework.core.runtime import choose_device

    card = flash.card(choose_device(device))
    for kind, choice in named.items():
        if reason := dispatch.why_not(kind, choice, card):
            others = [other for other in dispatch.CHOICES[kind][1:] if not dispatch.why_not(kind, other, card)]
            raise UsageError(f"ops.{kind}={choice}: {reason}; leave it out, or choose {' or '.join(others)}")
