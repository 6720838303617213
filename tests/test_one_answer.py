"""`parallel=` as a user meets it: another word, another number of ranks, the same figures."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from framework.models.config import ModelConfig
from tests.engine.test_layouts import bound
from tests.test_rank_faults import KEPT, Kill, finish, suffer
from tests.test_stopping import newest, words
from tests.tiny import PPO, end, fork, framework, model_folders


def test_ppo_under_tensor_parallel_on_ray(tmp_path: Path) -> None:
    """Every role with two ranks that share its matrices (the generator's hold the whole policy), against one process.
    The second iteration's score and KL are of the policy that the first one published."""
    policy, reward = model_folders(tmp_path)
    words = ["ppo", *PPO, f"init_from={policy}", f"reward_from={reward}", f"data.cache={tmp_path / 'prepared'}"]
    words += ["ppo.iterations=2", "rollout.strict=false", "evaluation.tasks=[]", "checkpoint.every=0"]
    log = tmp_path / "log"
    assert end(fork([*words, f"run.dir={tmp_path / 'ddp'}", "parallel=ddp"], log), log)[0] == 0
    assert "ppo: layout: ddp = one process; every generator holds the whole policy\n" in log.read_text()
    on_ray = ["cluster=ray", "cluster.workers=2", "cluster.colocate=true"]
    done = framework(*words, f"run.dir={tmp_path / 'tp'}", "parallel=tp", *on_ray, cwd=tmp_path)
    assert "ppo: layout: tp = tensor 2; every generator holds the whole policy\nppo: actor, critic, " in done.stdout
    assert ": rank 0 on cpu at tensor 0, rank 1 on cpu at tensor 1\n" in done.stdout
    tolerance = bound(ModelConfig(num_layers=1), 4 * 32)
    for one, two in zip(iterations(tmp_path / "ddp"), iterations(tmp_path / "tp"), strict=True):
        for name in ("ppo/score/mean", "ppo/kl/response", "actor/grad_norm", "critic/grad_norm", "critic/value_loss"):
            assert two[name] == pytest.approx(one[name], rel=tolerance, abs=tolerance), name
        assert one["actor/grad_norm"] > 0.1


def test_the_stream_of_rows_goes_on_under_another_layout_and_world(tmp_path: Path, whole: Path) -> None:
    """Two tensor ranks die once the checkpoint of step 4 stands; two data ranks go on from there, each with half of the
    rows. Every step's loss is the undisturbed process's: other rows would be off by a hundredth."""
    folder, log = tmp_path / "pretrain", tmp_path / "log"
    seed = "seed=1"  # one by which no two steps in a row have nearly one loss
    assert end(fork(words("pretrain", tmp_path / "alone", whole, seed), log), log)[0] == 0
    assert suffer(words("pretrain", tmp_path, whole, seed, "parallel=tp"), log, 2, Kill(0, KEPT, 2), 0.0)
    assert newest(folder) == 4
    finish(words("pretrain", tmp_path, whole, seed, "parallel=fsdp"), log, 2)
    assert json.loads((folder / "status.json").read_text())["attempt"] == 2
    mine, its = (losses(place / "pretrain") for place in (tmp_path, tmp_path / "alone"))
    assert list(mine) == [*range(1, 9)]
    assert mine == pytest.approx(its, rel=bound(ModelConfig(num_layers=1), 4 * 64))
    steps = list(its.values())
    assert min(abs(a - b) for a, b in pairwise(steps)) > 1e-3


def losses(folder: Path) -> dict[int, float]:
    """By step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def iterations(folder: Path) -> list[dict[str, float]]:
    """What was measured of each of the two, without the assessment before them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "ppo/score/mean" in line]
    assert len(found) == 2
    return found
