"""The benchmarks of a card run on a CPU, and both sides do the same work; tiny sizes, and no speed is looked at."""

import ast
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from cuda_ext.table import Table
from framework.core import random, runtime
from framework.core.records import Rollout
from framework.core.runtime import Runtime
from framework.engine.config import Precision
from framework.engine.flops import Work
from framework.planning.memory import RankMemory
from framework.stages.ppo import judge, make_experience
from tests.benchmarks.end_to_end import decoding, ppo, training
from tests.benchmarks.end_to_end.__main__ import main
from tests.benchmarks.end_to_end.bare_ppo import BareLoop, Judged
from tests.benchmarks.end_to_end.card import Bench
from tests.benchmarks.end_to_end.llamas import llama, write

ROOT = Path(__file__).resolve().parents[2]
CARD = torch.device("cuda", 0)  # that is not here: what would speak to it is replaced
(TRAINING,), (DECODING,), (PPO,) = training.TINY, decoding.TINY, ppo.TINY


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(runtime.start("cpu"), Table(tmp_path / "cards", "a CPU", {}), product=1e11, laps=1)


# --- training ------------------------------------------------------------------------------------------------------


def test_rows_are_packed_with_documents() -> None:
    rows = next(training.stream(TRAINING))
    for positions, ids in zip(rows.positions.tolist(), rows.document_ids.tolist(), strict=True):
        assert (positions[0], ids[0]) == (0, 1)
        for t in range(1, TRAINING.length):
            begins = positions[t] == 0
            assert ids[t] == ids[t - 1] + begins
            assert begins or positions[t] == positions[t - 1] + 1
    assert TRAINING.rows < int(rows.document_ids.amax(1).sum()) < 10 * TRAINING.rows
    assert bool(rows.loss_mask.all())


def test_the_engine_begins_at_transformers_loss(bench: Bench, tmp_path: Path) -> None:
    measured = training.measure(bench, TRAINING, micro_size=2, compiled=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(write(llama(TRAINING.name), tmp_path / "model"))
    rows = next(training.stream(TRAINING))
    apart = torch.where(rows.document_ids[:, :, None] == rows.document_ids[:, None], 0.0, -math.inf)
    mask = apart + torch.full(apart.shape[1:], -math.inf).triu(1)
    with torch.no_grad():
        logits = model(rows.tokens, attention_mask=mask[:, None], position_ids=rows.positions).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.flatten())
    assert measured.losses[0] == pytest.approx(float(expected), rel=2e-3)  # bf16
    assert (len(measured.seconds), measured.work.tokens, measured.peak) == (1, 4 * 64, None)


def test_mfu_by_hand(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """6e12 and 7e12 operations in 2 s, of 10e12 a second by data sheet and of 8e12 measured."""
    measured = training.Measured([1.0, 2.0, 9.0], Work(1000, 6e12, 7e12), [], None)
    own = {"MFU 6 N, % of own product": 37.5, "MFU exact, % of own product": 43.75}
    assert training.rates(replace(bench, product=8e12), measured) == pytest.approx(own)
    monkeypatch.setattr(runtime, "peak_flops", lambda device: 10e12)
    sheet = {"MFU 6 N, % of peak": 30.0, "MFU exact, % of peak": 35.0}
    assert training.rates(replace(bench, product=8e12), measured) == pytest.approx(sheet | own)


def test_memory_stands_beside_the_planner_s_word() -> None:
    memory = RankMemory(2**30, 2**30, 2**31, 0, 2**32, 0)
    assert training.held(None, memory) == {"GiB planned": 8.0}
    assert training.held(9 * 2**30, memory) == {"GiB planned": 8.0, "GiB held": 9.0, "% of planned": 112.5}


def test_as_many_rows_as_the_planner_says_fit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(TRAINING, length=512)
    sizes = {rows: task.planned(rows).total for rows in (1, 2, 4)}
    assert sizes[1] < sizes[2] < sizes[4]
    assert [training.most_rows(task, room) for room in (sizes[1] - 1, sizes[2], sizes[4] - 1)] == [0, 2, 2]
    assert training.most_rows(task, 100 * sizes[4]) == task.rows == 4
    free = SimpleNamespace(mem_get_info=lambda device: (1000, 2000), empty_cache=lambda: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: free)
    assert replace(bench, here=Runtime(device=CARD)).room() == 900


def test_where_the_planner_is_wrong_half_as_many_are_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def measure(bench: Bench, task: training.Task, micro_size: int, compiled: bool) -> str:
        tried.append(micro_size)
        if micro_size > 1:
            raise torch.OutOfMemoryError("full")
        return "measured"

    monkeypatch.setattr(training, "measure", measure)
    assert training.largest(bench, TRAINING, compiled=False) == (1, "measured")
    assert tried == [4, 2, 1]
    assert "4 rows at once do not fit, as the planner said they would" in capsys.readouterr().out
    monkeypatch.setattr(Bench, "room", lambda bench: 10**6)
    training.run(bench, TRAINING)
    assert "left out, not one row of 64 fits into 0.0 GiB" in capsys.readouterr().out


# --- decoding ------------------------------------------------------------------------------------------------------


def test_all_write_one_text_in_fp32(bench: Bench, tmp_path: Path) -> None:
    task = replace(DECODING, dtype=torch.float32)
    folder = write(llama(task.name), tmp_path / "model")
    sides = decoding.decoders(bench, task, folder, decoding.rival(bench, task, folder), rows=4)
    texts = {side: decode(task.prompts(4)) for side, decode in sides.items()}
    assert list(texts) == ["native", "generate, static cache", decoding.RIVAL]
    assert len({tuple(text.flatten().tolist()) for text in texts.values()}) == 1
    text = texts["native"]
    assert decoding.equal(task, text, text.clone()) == 100
    other = text.clone()
    other[0, 0] += 1
    assert decoding.equal(DECODING, text, other) == 75
    with pytest.raises(AssertionError, match="one text"):
        decoding.equal(task, text, other)
    with pytest.raises(AssertionError, match="15"):
        decoding.equal(task, text[:, :15], text)


# --- ppo -----------------------------------------------------------------------------------------------------------


def test_both_loops_learn_the_same_from_the_same_answers(bench: Bench, tmp_path: Path) -> None:
    """Two epochs and narrow clips, so that both losses are clipped; a second rollout, so that there is a KL."""
    config = ppo.recipe(replace(PPO, precision=Precision.FP32), tmp_path)
    narrow = replace(config.ppo, epochs=2, clip_low=1e-3, clip_high=2e-3, value_clip=1e-3)
    config = replace(config, ppo=narrow, optim=replace(config.optim, lr=1e-3, eps=1e-5))  # rounding stays small
    prompts = PPO.batch()
    ours, bare = ppo.OurLoop(config, prompts, bench.here), BareLoop(config, bench.here.device, torch.float32)
    assert bare.draw(prompts.tokens).shape == (PPO.prompts, PPO.prompt + PPO.answer)
    rollout = ours.draw(prompts)
    assert rollout.response_mask.sum(1).tolist() == [PPO.answer] * PPO.prompts

    judged = judged_alike(ours, bare, rollout)
    every = np.arange(PPO.prompts)
    epochs = (random.shuffled(config.seed, f"minibatches:0:{epoch}", PPO.prompts, every) for epoch in range(2))
    figures = ours.learn(rollout)
    value, policy = bare.update(judged, [rows for order in epochs for rows in torch.from_numpy(order).split(PPO.size)])
    assert min(figures["actor/clip_fraction"], figures["critic/value_clip_fraction"]) > 0.01
    assert (value, policy) == pytest.approx((figures["critic/value_loss"], figures["actor/policy_loss"]), abs=1e-5)
    assert policy_gap(ours, bare, tmp_path) < 1e-3 * config.optim.lr
    judged_alike(ours, bare, ours.draw(prompts))


def judged_alike(ours: ppo.OurLoop, bare: BareLoop, rollout: Rollout) -> Judged:
    """What the rival says of our answers, once it is shown to be what we say of them."""
    ppo_config, judged = ours.config.ppo, bare.judge(rollout.tokens)
    experience, _ = make_experience(rollout, judge(ours.roles, rollout), ppo_config.kl_coefficient, ppo_config)
    said = {"log_probs": experience.old_log_probs, "values": experience.values}
    said |= {"advantages": experience.advantages, "returns": experience.returns}
    for name, tensor in said.items():
        torch.testing.assert_close(tensor[:, PPO.prompt :], getattr(judged, name), rtol=1e-3, atol=1e-4)
    return judged


def policy_gap(ours: ppo.OurLoop, bare: BareLoop, place: Path) -> float:
    """The mean difference of the policies' weights; an update moves each by about the learning rate."""
    ours.roles.actor.export(str(place / "learnt"), {}).result()
    learnt = dict(transformers.AutoModelForCausalLM.from_pretrained(place / "learnt").named_parameters())
    with torch.no_grad():
        gaps = [(learnt[name] - parameter).abs().flatten() for name, parameter in bare.policy.named_parameters()]
    return float(torch.cat(gaps).mean())


def test_gae_of_the_rival_by_hand() -> None:
    """gamma 0.5, lambda 0.5: deltas 1 + 0.5 x 4 - 2 = 1 and 3 - 4 = -1."""
    loop = SimpleNamespace(ppo=SimpleNamespace(gamma=0.5, lam=0.5))
    advantages = BareLoop.advantages(loop, torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]))  # type: ignore[arg-type]
    assert advantages.tolist() == [[0.75, -1.0]]
    rows = Judged(*(torch.tensor([[n], [n + 1.0]]) for n in range(5)))
    assert rows.select(torch.tensor([1])).returns.tolist() == [[5.0]]


# --- the commands --------------------------------------------------------------------------------------------------


def test_every_part_adds_its_lines_to_the_card_s_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--folder", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["lines"]
    assert {line["what"]: line["unit"] for line in found} == {
        "training": "tokens/s",
        "decoding": "tokens/s",
        "ppo": "answers/s",
    }
    assert [line["side"] for line in found if line["what"] == "ppo"] == ["framework", ppo.RIVAL]
    assert all(line["value"] > 0 for line in found)
    assert found[0]["figures"].keys() >= {"MFU 6 N, % of own product", "goal, %", "rows at once", "GiB planned"}
    assert capsys.readouterr().out.splitlines()[-1] == str(path.with_suffix(".md"))
    with pytest.raises(SystemExit):
        main(["tests"])
    assert "'tests' is no part: choose of training, decoding, ppo" in capsys.readouterr().err


def test_a_missing_package_is_named_and_nothing_has_failed(tmp_path: Path) -> None:
    code = "import sys; sys.modules['transformers'] = None; from tests.benchmarks.end_to_end.__main__ import main; "
    command = [sys.executable, "-c", f"{code}sys.exit(main(['--folder', {str(tmp_path)!r}]))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "end to end: skipped, transformers is missing\n"), done.stderr


def test_on_a_card_no_test_draws_by_a_generator_of_the_cpu() -> None:
    """There tensors are made on the card where nothing else is said, and torch refuses a generator of another place."""
    for path in (ROOT / "tests/cuda_ext").glob("*.py"):
        if "def test_emulated" not in (text := path.read_text()) and path.name != "emulated.py":
            continue
        for node in ast.walk(ast.parse(text)):
            words = {word.arg for word in node.keywords} if isinstance(node, ast.Call) else set()
            assert "generator" not in words or "device" in words, f"{path.name}:{node.lineno}"  # type: ignore[attr-defined]


def test_the_kernels_part_needs_torch_numpy_and_pytest_alone() -> None:
    foreign = [
        "hydra",
        "omegaconf",
        "yaml",
        "tokenizers",
        "safetensors",
        "jinja2",
        "filelock",
        "pyarrow",
        "rich",
        "ray",
    ]
    code = f"""
import importlib, pathlib, sys
sys.modules |= dict.fromkeys({[*foreign, "ray", "transformers", "hypothesis", "pytest_timeout"]})
import pytest, cuda_ext.roofline
for path in pathlib.Path("cuda_ext").glob("*/benchmark.py"):
    importlib.import_module(f"cuda_ext.{{path.parent.name}}.benchmark")
files = [str(path) for path in pathlib.Path("tests/cuda_ext").glob("*.py") if "def test_emulated" in path.read_text()]
sys.exit(pytest.main(["--collect-only", "-q", "-k", "test_emulated", *files]))
"""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_rms_norm_kernel.py" in done.stdout


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_script_stops_at_once() -> None:
    done = gpu(sys.executable)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "launch/gpu: torch sees no GPU here: nothing was run\n"


def test_the_script_runs_its_parts_in_order(tmp_path: Path) -> None:
    """With an interpreter that only takes note of what it is asked."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "${{CUDA_EXT:-}}:$*" >> {asked}\n')
    python.chmod(0o755)
    assert gpu(str(python)).returncode == 0
    build, explain, kernel_tests, *sanitized, benchmark, end_to_end = asked.read_text().splitlines()
    assert (build, explain) == (":-m cuda_ext build", ":-m cuda_ext explain")
    words = "cuda:-m pytest -q -p no:cacheprovider -k test_emulated or test_card tests/cuda_ext/test_adamw_k"
    assert kernel_tests.startswith(words)
    assert not sanitized  # it would not be started by this interpreter
    assert benchmark == "cuda:-m cuda_ext benchmark"
    assert end_to_end == ":-m tests.benchmarks.end_to_end"
    asked.unlink()
    assert gpu(str(python), "end_to_end").returncode == 0
    assert asked.read_text().splitlines() == [build, explain, end_to_end]
    assert "'tset' is no part" in gpu(str(python), "tset").stderr


def test_the_script_goes_on_after_a_part_that_failed(tmp_path: Path) -> None:
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "$2" >> {asked}\n[ "$2" != pytest ]\n')
    python.chmod(0o755)
    done = gpu(str(python))
    assert (done.returncode, done.stderr) == (1, "launch/gpu: failed: tests\n")
    assert asked.read_text().split() == ["cuda_ext", "cuda_ext", "pytest", "cuda_ext", "tests.benchmarks.end_to_end"]


def gpu(python: str, *parts: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_EXT")}
    environment = kept | {"PYTHON": python, "PATH": "/usr/bin:/bin"}
    words = ["bash", "launch/gpu", *parts]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
