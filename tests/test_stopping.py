"""Asked to stop anywhere, a run saves, exits as the signal says, and its command goes on to the bits of an undisturbed
one; a second signal leaves at once; a process left over from an earlier attempt is fenced off.

Most cases fork this process, which has imported everything already, and call `main` there: a process of its own with
real signals, four times as quick as a new command. torchrun, Ray and the pipeline are real commands.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framework.checkpoint.manifest import Checkpoint
from tests.test_faults import fingerprints
from tests.test_local import LOCAL
from tests.tiny import STAGES, WORDS, command, end, environment, fork

ASK = str(Path(__file__).with_name("ask.py"))
PARENTS = {
    "tokenizer": {},
    "pretrain": {"tokenizer": "tokenizer"},
    "sft": {"init_from": "pretrain"},
    "reward_model": {"init_from": "sft"},
    "ppo": {"init_from": "sft", "reward_from": "reward_model"},
    "evaluate": {"init_from": "ppo"},
}
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}
STEP, MEASURE = "framework.engine.torch_engine:TorchEngine.forward_backward", "framework.engine.loop:evaluate"
TASKS, BASELINE = "framework.evaluation.runner:generate_text", "framework.stages.baselines:_batches"

# (stage, signal, where, at which call, the newest checkpoint afterwards (None: there is none))
CASES = [
    ("tokenizer", "SIGTERM", "framework.stages.tokenizer:_text_of", 100, None),
    ("pretrain", "SIGUSR1", "framework.stages.pretrain:open_start", 1, None),
    ("pretrain", "SIGINT", "framework.data.prepare:_Writer.add", 1, None),
    ("pretrain", "SIGTERM", MEASURE, 1, None),
    ("pretrain", "SIGINT", STEP, 3, 3),
    ("pretrain", "SIGTERM", MEASURE, 2, 4),  # of step 4, which is saved though it was not validated yet
    ("pretrain", "SIGUSR1", TASKS, 1, 8),
    ("reward_model", "SIGTERM", BASELINE, 1, 8),
    ("ppo", "SIGINT", "framework.stages.ppo:Assessor.assess", 1, None),
    ("ppo", "SIGTERM", "framework.stages.roles:Roles.answer", 4, 0),  # the rollout of iteration 1 is drawn again
    ("ppo", "SIGUSR1", "framework.stages.ppo:judge", 2, 1),
    ("ppo", "SIGTERM", "framework.stages.ppo:update", 2, 2),  # an update that has begun is finished
    ("ppo", "SIGTERM", "framework.stages.ppo:Assessor.assess", 2, 3),
    ("evaluate", "SIGTERM", TASKS, 2, None),
]


def words(stage: str, root: Path, whole: Path, *more: str) -> list[str]:
    """The pipeline's stage by itself, in root/stage, from the parents of the whole run."""
    common = [word for word in WORDS if not word.startswith("experiment") and "." not in word.split("=")[0]]
    tiny = [word.removeprefix(f"{stage}.") for word in WORDS if word.startswith(f"{stage}.")]
    parents = [f"{role}={whole / name / 'model'}" for role, name in PARENTS[stage].items()]
    fixed = [f"experiment=quickstart/{stage}", f"run.root={root}", "tracking.progress=false"]
    fixed += ["tracking.every=1", "tracking.digest_every=1"]
    baselines = ["evaluation.baselines=true"] if stage == "reward_model" else []
    return [stage, *fixed, *common, *parents, *tiny, *baselines, f"extensions=[{ASK}]", *more]


def status(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "status.json").read_text())
    return content


def newest(folder: Path) -> int | None:
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*")), default=None)


def check_stop_and_continuation(
    folder: Path, whole: Path, stage: str, name: str, where: str, nth: int, saved: int | None
) -> None:
    argv, log = words(stage, folder, whole), folder / "log"
    code, said = end(fork(argv, log, f"{name} {where} {nth}"), log)
    assert code == CODES[name], said
    assert "; the same command continues from here" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert status(folder / stage)["state"] == "interrupted"
    assert newest(folder / stage) == saved
    assert not (folder / stage / "summary.json").exists()
    code, said = end(fork(argv, log), log)
    assert code == 0, said
    assert status(folder / stage)["attempt"] == 2
    expected = {name: print_ for name, print_ in fingerprints(whole).items() if name.startswith(f"{stage}/")}
    assert fingerprints(folder) == expected
    said_by = [(root / stage / "samples.jsonl") for root in (folder, whole)]
    assert not said_by[1].exists() or said_by[0].read_text() == said_by[1].read_text()


@pytest.mark.parametrize(("stage", "name", "where", "nth", "saved"), CASES)
def test_asked_anywhere_it_saves_and_continues(
    tmp_path: Path, whole: Path, stage: str, name: str, where: str, nth: int, saved: int | None
) -> None:
    check_stop_and_continuation(tmp_path, whole, stage, name, where, nth, saved)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("stage", "_", "where", "nth", "saved"), CASES)
def test_asked_anywhere_by_any_signal(
    tmp_path: Path, whole: Path, stage: str, name: str, _: str, where: str, nth: int, saved: int | None
) -> None:
    check_stop_and_continuation(tmp_path, whole, stage, name, where, nth, saved)


@pytest.mark.parametrize(("names", "code"), [("SIGTERM,SIGTERM", 143), ("SIGUSR1,SIGINT", 130)])
def test_a_second_signal_leaves_at_once_and_what_was_saved_stands(
    tmp_path: Path, whole: Path, names: str, code: int
) -> None:
    argv, log = words("pretrain", tmp_path, whole, "checkpoint.background=false"), tmp_path / "log"
    returned, said = end(fork(argv, log, f"{names} {STEP} 4"), log)
    assert (returned, said.splitlines()[-1]) == (code, "framework pretrain: stopped at once, without saving")
    assert status(tmp_path / "pretrain")["state"] == "interrupted"
    assert newest(tmp_path / "pretrain") == 2


def test_asked_while_a_checkpoint_is_written_beside_the_steps_it_ends_with_whole_ones(
    tmp_path: Path, whole: Path
) -> None:
    argv, log = words("pretrain", tmp_path, whole), tmp_path / "log"
    code, said = end(fork(argv, log, "SIGTERM framework.checkpoint.format:_write_safetensors 1"), log)
    assert code == 143, said
    found = {path.name: Checkpoint(path).problems() for path in (tmp_path / "pretrain/checkpoints").iterdir()}
    assert "step_00000002" in found
    assert len(found) == 2
    assert not any(found.values())
    assert end(fork(argv, log), log)[0] == 0
    assert fingerprints(tmp_path) == {n: p for n, p in fingerprints(whole).items() if n.startswith("pretrain/")}


def test_a_pipeline_stops_between_two_stages(tmp_path: Path) -> None:
    tiny = [word for word in WORDS if word.split(".")[0] not in STAGES[2:]]
    argv = ["pipeline", *tiny, "stages=[quickstart/tokenizer,quickstart/pretrain]", f"run.dir={tmp_path / 'run'}"]
    argv, log = [*argv, f"extensions=[{ASK}]"], tmp_path / "log"
    code, said = end(fork(argv, log, "SIGTERM framework.stages.pretrain:run 1"), log)
    assert (code, said.splitlines()[-1]) == (
        143, "framework pipeline: stopped before it began; the same command continues from here",
    )  # fmt: skip
    assert status(tmp_path / "run/tokenizer")["state"] == "finished"
    assert status(tmp_path / "run")["state"] == "interrupted"
    assert end(fork(argv, log), log)[0] == 0


def test_a_leftover_process_is_fenced_off(tmp_path: Path, whole: Path) -> None:
    """The first attempt is frozen in step 3; the second one takes the run over and finishes; then the first wakes."""
    argv, log = words("pretrain", tmp_path, whole), tmp_path / "log"
    frozen = fork(argv, tmp_path / "frozen", f"SIGSTOP {STEP} 3")
    assert frozen.pid is not None
    until = time.monotonic() + 60
    while Path(f"/proc/{frozen.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until
        time.sleep(0.02)
    code, said = end(fork(argv, log), log)
    assert code == 0, said
    folder = tmp_path / "pretrain"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    os.kill(frozen.pid, signal.SIGCONT)
    code, said = end(frozen, tmp_path / "frozen")
    assert code == 1
    assert "attempt 1 is over, a newer one has taken the run; this process must end" in said.splitlines()[-1]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert fingerprints(tmp_path) == {n: p for n, p in fingerprints(whole).items() if n.startswith("pretrain/")}


def local(words: list[str], cwd: Path, **asked: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LOCAL, "2", *words], cwd=cwd, env=environment() | asked, capture_output=True, text=True, timeout=200
    )


def check_stop_together(folder: Path, whole: Path, name: str, where: str, nth: int, saved: int | None) -> list[str]:
    """Rank 1 alone is asked."""
    argv = words("pretrain", folder, whole, "parallel=fsdp")
    stopped = local(argv, folder, ASK=f"{name} {where} {nth}", ASK_RANK="1")
    assert stopped.returncode == CODES[name], stopped.stderr
    assert stopped.stderr.count("; the same command continues from here") == 2
    assert "Traceback" not in stopped.stderr
    assert newest(folder / "pretrain") == saved
    return argv


def check_close(one: Path, two: Path) -> None:
    """Law Layout, in short: weights within 1e-4 of the scale."""
    first, second = (load_file(root / "pretrain/model/model.safetensors") for root in (one, two))
    scale = torch.cat([weight.flatten() for weight in first.values()]).square().mean().sqrt()
    for tensor, weight in first.items():
        assert (second[tensor] - weight).abs().max() <= 1e-4 * max(weight.abs().max(), scale), tensor


def test_a_signal_to_one_rank_alone_stops_all(tmp_path: Path, whole: Path) -> None:
    check_stop_together(tmp_path, whole, "SIGTERM", MEASURE, 2, 4)
    log = tmp_path / "log"
    assert end(fork(words("pretrain", tmp_path, whole), log), log)[0] == 0  # goes on by itself, as a layout may change
    check_close(whole, tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(
    ("where", "nth", "saved"), [("framework.stages.pretrain:open_both", 1, None), (MEASURE, 1, None), (STEP, 3, 3)]
)
def test_a_signal_to_one_rank_alone_stops_all_anywhere(
    tmp_path: Path, whole: Path, name: str, where: str, nth: int, saved: int | None
) -> None:
    assert local(check_stop_together(tmp_path, whole, name, where, nth, saved), tmp_path).returncode == 0
    check_close(whole, tmp_path)


def check_ray_stops(folder: Path, whole: Path, ask: str) -> None:
    argv, log = words("ppo", folder, whole), folder / "log"
    process = subprocess.run(
        command(*argv, "cluster=ray"),
        cwd=folder,
        env=environment() | {"ASK": ask},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == CODES[ask.split()[0]], process.stderr
    assert "; the same command continues from here" in process.stderr
    assert "Traceback" not in process.stderr
    assert newest(folder / "ppo") is not None
    assert end(fork(argv, log), log)[0] == 0  # in one process, for a layout does not change the answer
    assert fingerprints(folder) == {n: p for n, p in fingerprints(whole).items() if n.startswith("ppo/")}


def test_a_signal_to_a_ray_worker_alone_stops_the_run(tmp_path: Path, whole: Path) -> None:
    check_ray_stops(tmp_path, whole, "SIGTERM framework.workers.critic:Critic.update 3")


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])  # Ray blocks SIGINT in its workers
@pytest.mark.parametrize(
    "where", ["generator:Generator.generate 6", "actor:Actor.log_probs 6", "reward:Reward.score 3"]
)
def test_a_signal_to_any_ray_worker(tmp_path: Path, whole: Path, name: str, where: str) -> None:
    check_ray_stops(tmp_path, whole, f"{name} framework.workers.{where}")
