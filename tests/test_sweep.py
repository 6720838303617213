"""Sweeps by real commands: Hydra's own `-m`, and the Optuna sweeper on a stage's figure."""

import json
from pathlib import Path

import pytest
import yaml

from tests.tiny import framework

WORDS = ["tokenizer", "-m", "data.train=corpora/tang/valid.txt", "tokenizer.kind=bpe"]


def test_each_job_of_a_multirun_has_its_own_folder(tmp_path: Path) -> None:
    framework(*WORDS, "tokenizer.vocab_size=400,500", cwd=tmp_path)
    for number, size in enumerate((400, 500)):
        summary = json.loads((tmp_path / f"runs/tokenizer-{number}/summary.json").read_text())
        assert summary["figures"]["vocab_size"] == size


def test_optuna_finds_the_better_choice(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]
    sizes = "tokenizer.vocab_size=choice(400,600)"
    framework(*WORDS, *sweep, "hydra.sweeper.sampler.seed=1", sizes, "objective=bytes_per_token", cwd=tmp_path)
    result = yaml.safe_load((tmp_path / "runs/sweep/optimization_results.yaml").read_text())
    tried = [json.loads(p.read_text())["figures"] for p in tmp_path.glob("runs/tokenizer-*/summary.json")]
    assert result["best_value"] == max(figures["bytes_per_token"] for figures in tried)


def test_a_wrong_key_in_a_sweep_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = framework(*WORDS, "tokenizer.vocab_sizes=400,500", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "unknown key 'tokenizer.vocab_sizes': did you mean 'tokenizer.vocab_size'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pipeline_is_not_swept(tmp_path: Path) -> None:
    done = framework("pipeline", "-m", "experiment=quickstart", "seed=0,1", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "-m sweeps one stage" in done.stderr
