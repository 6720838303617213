"""Sweeps in processes of their own: Hydra's own `-m`, the Optuna sweeper on a figure, and the submitit launchers."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import forked

WORDS = ["tokenizer", "-m", "data.train=corpora/tang/valid.txt", "tokenizer.kind=bpe"]


def test_each_job_of_a_multirun_has_its_own_folder(tmp_path: Path) -> None:
    forked(*WORDS, "tokenizer.vocab_size=400,500", cwd=tmp_path)
    for number, size in enumerate((400, 500)):
        summary = json.loads((tmp_path / f"runs/tokenizer-{number}/summary.json").read_text())
        assert summary["figures"]["vocab_size"] == size


def test_optuna_finds_the_better_choice(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]
    sizes = "tokenizer.vocab_size=choice(400,600)"
    forked(*WORDS, *sweep, "hydra.sweeper.sampler.seed=1", sizes, "objective=bytes_per_token", cwd=tmp_path)
    result = yaml.safe_load((tmp_path / "runs/sweep/optimization_results.yaml").read_text())
    tried = [json.loads(p.read_text())["figures"] for p in tmp_path.glob("runs/tokenizer-*/summary.json")]
    assert result["best_value"] == max(figures["bytes_per_token"] for figures in tried)


def test_a_wrong_key_in_a_sweep_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = forked(*WORDS, "tokenizer.vocab_sizes=400,500", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "unknown key 'tokenizer.vocab_sizes': did you mean 'tokenizer.vocab_size'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failing_job_is_named_and_the_others_run(tmp_path: Path) -> None:
    missing = "data.train=[nowhere.txt],[corpora/tang/valid.txt]"
    done = forked(*WORDS[:2], missing, WORDS[3], "tokenizer.vocab_size=400", cwd=tmp_path, check=False)
    assert done.returncode == 2
    first, second = done.stderr.strip().splitlines()[-2:]
    assert first.startswith("Error executing job with overrides: ['data.train=[nowhere.txt]'")
    assert second == "framework tokenizer: data.train: nowhere.txt: no such file or folder"
    assert (tmp_path / "runs/tokenizer-1/summary.json").exists()


def test_submitit_runs_each_job_in_a_process_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    forked(*WORDS, "hydra/launcher=submitit_local", "tokenizer.vocab_size=400,500", cwd=tmp_path)
    for number, size in enumerate((400, 500)):
        summary = json.loads((tmp_path / f"runs/tokenizer-{number}/summary.json").read_text())
        assert summary["figures"]["vocab_size"] == size
    assert len(list(tmp_path.glob("runs/sweep/.submitit/*/*_result.pkl"))) == 2


SLURM = r"""#!{python}
# Stands in for the Slurm command that it is called as: the jobs of an array run here.
import os, re, subprocess, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "sbatch":
    script = open(words[0]).read()
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
    for task in range(first, last + 1):
        ids = {{"SLURM_JOB_ID": str(8 + task), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task),
               "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
               "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here"}}
        subprocess.Popen(["bash", words[0]], env=os.environ | ids, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print("Submitted batch job 7")
elif name == "srun":
    at = next(i for i, word in enumerate(words) if word == {python!r})
    sys.exit(subprocess.run(words[at:]).returncode)
elif name == "sacct":
    print("JobID|State|NodeList")
    for task in range(2):
        print(f"7_{{task}}|RUNNING|here")
"""


def test_submitit_hands_the_jobs_to_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins for sbatch, srun and sacct: what is submitted is a batch script with our words, and it runs."""
    pytest.importorskip("submitit")
    for name in ("sbatch", "srun", "sacct"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SLURM.format(python=sys.executable))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=a100", "hydra.launcher.timeout_min=90"]
    forked(*WORDS, *slurm, "tokenizer.vocab_size=400,500", cwd=tmp_path)
    script = next(tmp_path.glob("runs/sweep/.submitit/**/*.sh"))  # each job has a copy
    for line in ("--partition=a100", "--time=90", "--array=0-1%2"):
        assert f"#SBATCH {line}" in script.read_text()
    for number, size in enumerate((400, 500)):
        summary = json.loads((tmp_path / f"runs/tokenizer-{number}/summary.json").read_text())
        assert summary["figures"]["vocab_size"] == size


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("hydra/launcher=submitit_slurm", "hydra/launcher=submitit_slurm needs Slurm's srun on PATH"),
        ("hydra/launcher=submtit", "unknown choice hydra/launcher=submtit: basic is there; submitit_local and"),
        ("hydra/sweeper=optna", "unknown choice hydra/sweeper=optna: basic is there; optuna comes with pip install"),
    ],
)
def test_a_launcher_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path, word: str, line: str) -> None:
    done = forked(*WORDS, word, "tokenizer.vocab_size=400,500", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_pipeline_is_not_swept(tmp_path: Path) -> None:
    done = forked("pipeline", "-m", "experiment=quickstart", "seed=0,1", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "-m sweeps one stage" in done.stderr
