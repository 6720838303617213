"""Wrong uses of the command: one clear line, the right exit code, no traceback, nothing half-written.

ROWS is the table; below it stands the runner. Left out: what needs a process to be killed or a disk to fill up
(`test_bad_input`, `test_faults`).
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.numpy

from tests.tiny import forked, framework, model_folders

Content = str | bytes | None | Callable[[bytes], bytes]  # None: a folder; a function: of what stands there already


class Wrong(NamedTuple):
    """Words as a shell takes them (POLICY, REWARD: two models' folders), and what is answered on stderr."""

    words: str
    line: str
    files: Mapping[str, Content] = {}  # "m": "POLICY" copies that model, "DELETE" takes a file out of it
    code: int = 2


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def seven_rows(content: bytes) -> bytes:
    """A model's file with an embedding of seven tokens."""
    tensors = safetensors.numpy.load(content)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:7]
    return safetensors.numpy.save(tensors)


def entry(**words: object) -> dict[str, Content]:
    """A dataset_info.json whose dataset is called x, beside a file."""
    return {"d/dataset_info.json": json.dumps({"x": words}), "d/a.json": json.dumps([GOOD])}


def extension(kind: str, body: str, **more: Content) -> dict[str, Content]:
    """my.py that registers `def mine(x)` of that body."""
    head = f"from framework.core.registry import register\n@register({kind!r}, 'mine')\n"
    return {**SAMPLES, "my.py": f"{head}def mine(x):\n    {body}\n", **more}


GOOD = {"instruction": "花落家童未掃，用花字。", "output": "鳥啼山客猶眠。"}
ASKED = [{"role": "user", "content": "花"}]
SAMPLES: dict[str, Content] = {"a.jsonl": lines(GOOD, {**GOOD, "input": "月"})}
PROMPTS: dict[str, Content] = {"a.jsonl": lines({"prompt": "花"}, {"prompt": "月"})}
TEXT: dict[str, Content] = {"a.txt": "春眠不覺曉\n\n處處聞啼鳥\n"}

QUIET = "device=cpu threads=1 tracking.progress=false"
TINY = f"{QUIET} batch.size=2 train.steps=1 data.max_tokens=48"
SFT = f"sft init_from=POLICY data.train=a.jsonl {TINY}"
OWN = f"sft init_from=m data.train=a.jsonl {TINY}"
RM = f"reward_model init_from=POLICY data.train=a.jsonl {TINY}"
PRETRAIN = f"pretrain tokenizer=POLICY model=tiny model.num_layers=1 {TINY}"
INFO = f"sft init_from=POLICY data.train=d/x {TINY}"
PPO = (
    f"ppo init_from=POLICY reward_from=REWARD data.train=a.jsonl {QUIET} cluster=in_process ppo.iterations=1 "
    "rollout.prompts=2 batch.size=2 rollout.max_prompt_tokens=20 rollout.max_tokens=4"
)
EVALUATE = f"evaluate init_from=POLICY evaluation.tasks=[verse_form] evaluation.limit=1 {QUIET}"
# Refused before anything is looked at, so that the folders need not exist.
_SFT = "sft init_from=base data.train=a.jsonl"
_DPO = "preference init_from=base data.train=a.jsonl"
_PPO = "ppo init_from=base reward_from=rm data.train=p.jsonl"

ROWS = [
    # --- command words
    Wrong("sfft", "unknown command 'sfft': did you mean 'sft'?"),
    Wrong("--version", "unknown command '--version': Choose one of: chat, classify"),
    Wrong("sft optim.lrr=1", "unknown key 'optim.lrr': did you mean 'optim.lr'?"),
    Wrong("sft batchs.size=1", "unknown key 'batchs.size': did you mean 'batch.size'?"),
    Wrong("sft +learn=1", "unknown key 'learn'"),
    Wrong("sft --learning_rate=1", "unknown key 'learning_rate': it is set by optim.lr here"),
    Wrong("sft ppo_micro_batch_size_per_gpu=1", "unknown key 'ppo_micro_batch_size_per_gpu': it is set by"),
    Wrong("sft lr", "'lr' is not of the form key=value"),
    Wrong("sft =1", "'=1' is not of the form key=value"),
    Wrong("sft --config-dir=x", "'--config-dir=x' is not of the form key=value"),
    Wrong("sft optim.lr=fast", "optim.lr=fast is not a number"),
    Wrong("sft seed=1.5", "seed=1.5 is not a whole number"),
    Wrong("sft seed=1,2", "To sweep over it, add --multirun"),
    Wrong("sft optim=adam", "optim=adam: optim is a section, its keys are optim.lr, optim.beta1"),
    Wrong("sft run.dir=null", "run.dir=null: it takes a value"),
    Wrong("sft ~optim.lr", "optim.lr"),
    Wrong("sft 'name=${nope}'", "name: Interpolation key 'nope' not found"),
    Wrong("sft stage=ppo", "'stage=ppo': the command names the stage: framework ppo ..."),
    Wrong("sft optim.schedule=cosin", "optim.schedule=cosin: did you mean 'cosine'?"),
    Wrong("sft parallel=fsd", "unknown choice parallel=fsd: did you mean 'fsdp'?"),
    Wrong("sft tracking=wadb", "unknown choice tracking=wadb: did you mean 'wandb'?"),
    Wrong("sft experiment=nothing", "unknown choice experiment=nothing"),
    Wrong("sft experiment=../../etc", "unknown choice experiment=../../etc"),
    Wrong("sft experiment=quickstart/ppo", "experiment=quickstart/ppo is not for sft: it sets cluster"),
    Wrong("sft cluster=ray", "sft has no group 'cluster': Choose one of: experiment, model, parallel, tracking"),
    Wrong(f"{_SFT} device=tpu", "device=tpu: choose auto, cpu or cuda"),
    Wrong(f"{_SFT} threads=100000", "threads=100000 must be from 1 to 1024"),
    Wrong(f"{_SFT} name=..", "name='..' names no folder"),
    Wrong(f"{_SFT} run.dir=''", "run.dir is empty; name a folder"),
    # --- what each stage needs
    Wrong("tokenizer", "data.train is empty"),
    Wrong("tokenizer data.train=a.txt tokenizer.kind=bpee", "tokenizer.kind=bpee: did you mean 'bpe'?"),
    Wrong("tokenizer data.train=a.txt tokenizer.vocab_size=3", "tokenizer.vocab_size=3 must be more than 261"),
    Wrong("tokenizer data.train=a.txt", "a.txt: the file holds no record", {"a.txt": ""}),
    Wrong("tokenizer data.train=a.jsonl", "a tokenizer learns from texts or conversations", PROMPTS),
    Wrong("tokenizer trian data.train=a.txt", "tokenizer trian: did you mean 'train'?"),
    Wrong("explain tokenizer compare a", "tokenizer compare has no recipe: framework tokenizer compare FOLDER"),
    Wrong("tokenizer extend", "tokenizer extend takes what it extends: framework tokenizer extend FOLDER"),
    Wrong("tokenizer extend data.train=a.txt", "tokenizer extend takes what it extends"),
    Wrong("tokenizer extend nowhere data.train=a.txt", "no such folder: nowhere", TEXT),
    Wrong("tokenizer extend POLICY data.train=a.txt tokenizer.kind=unigram", "keeps its kind, special tokens", TEXT),
    Wrong("tokenizer extend POLICY data.train=a.txt tokenizer.new_tokens=0", "new_tokens=0 must be at least 1", TEXT),
    Wrong("tokenizer extend POLICY data.train=a.txt", "the text holds no piece, seen twice", TEXT),
    Wrong("tokenizer compare POLICY", "the following arguments are required: --file"),
    Wrong("tokenizer compare m --file a.txt", "no such tokenizer folder: m", TEXT),
    Wrong("tokenizer compare m --file a.txt", "m has no tokenizer.json; write one with", {"m": None, **TEXT}),
    Wrong("tokenizer compare POLICY --file a.txt", "a.txt:2: not UTF-8: byte 0xb4; convert", {"a.txt": b"a\n\xb4\xba"}),
    Wrong("tokenizer compare POLICY --file b.txt", "b.txt: no such file or folder", TEXT),
    Wrong("tokenizer data.train=a.txt", "a.txt:2: not UTF-8: byte 0xb4; convert", {"a.txt": b"a\n\xb4\xba"}),
    Wrong("pretrain data.train=[a]", "pretraining needs exactly one of tokenizer=FOLDER"),
    Wrong("pretrain data.train=[a] tokenizer=t init_from=m", "got tokenizer=t and init_from=m"),
    Wrong("pretrain data.train=[a] tokenizer=t model=huge", "unknown choice model=huge"),
    Wrong("pretrain data.train=[a] tokenizer=t train.epochs=0", "train.epochs=0.0 must be positive"),
    Wrong("pretrain data.train=[a] tokenizer=t model.window=-1", "model.window=-1 must be at least 1"),
    Wrong(
        "pretrain data.train=[a] tokenizer=t model.rope_scaling.kind=yarn model.rope_scaling.factor=4",
        "model.rope_scaling.kind=yarn needs model.rope_scaling.original_positions",
    ),
    Wrong(
        "pretrain data.train=[a] tokenizer=t model.attention_bias=true",
        "model.attention_bias=True: Choose one of: all, none, qkv",
    ),
    Wrong("sft data.train=[a]", "sft starts from a model: init_from=FOLDER"),
    Wrong(f"{SFT} train.freeze=[layrs.0]", "train.freeze: 'layrs.0' is no part of this model: did you mean", SAMPLES),
    Wrong(f"{SFT} train.last_layers=2", "train.last_layers=2, but the model has 1 layers; choose at most 1", SAMPLES),
    Wrong("sft init_from=base", "data.train is empty"),
    Wrong(f"{_SFT} lora.rank=4 train.last_layers=1", "train.freeze and train.last_layers do not go with lora.rank"),
    Wrong(f"{_PPO} lora.rank=8 lora.dropout=0.1", "lora.dropout=0.1 does not go with ppo, whose first ratio must be 1"),
    Wrong(f"{_SFT} lora.rank=4 lora.base=nf4 lora.dora=true", "lora.base=nf4 is for a base beside an adapter"),
    Wrong(f"{_SFT} lora.rank=4 lora.dropout=1", "lora.dropout=1.0 must be in [0, 1)"),
    Wrong(f"{_SFT} lora.rank=4 load_in_4bit=true", "unknown key 'load_in_4bit': it is set by lora.base here"),
    Wrong(f"{SFT} lora.rank=4 lora.targets=[q_proj]", "lora.targets: 'q_proj' is no part of this model", SAMPLES),
    Wrong(f"{_SFT} optim.lr=inf", "optim.lr=inf must be finite"),
    Wrong(f"{_SFT} optim.clip=-1", "optim.clip=-1.0 must not be negative"),
    Wrong(f"{_SFT} parallel=zero2 parallel.shard=2", "parallel.zero=2 does not go with parallel.shard=2"),
    Wrong(f"{_SFT} parallel=zero3 parallel.recompute=selective", "recompute=selective does not go with parallel=zero3"),
    Wrong(f"{_SFT} parallel=zero2 parallel.offload=true", "parallel.offload=true needs parallel.zero=3, not 2"),
    Wrong(f"{_SFT} parallel=zero3 parallel.zero=4", "parallel.zero=4: choose 1, 2 or 3"),
    Wrong(f"{_SFT} parallel=zero3 engine.compile=true", "engine.compile=true does not go with parallel=zero3"),
    Wrong(f"{_PPO} parallel=zero3 engine.compile=true", "engine.compile=true does not go with parallel=zero3"),
    Wrong(f"{_SFT} engine.strict=true engine.compile=true", "engine.strict=true needs engine.compile=false"),
    Wrong("classify data.train=[a]", "classify starts from a model: init_from=FOLDER"),
    Wrong("classify init_from=m data.train=[a] classify.labels=[a]", "classify.labels=[a]: one class leaves nothing"),
    Wrong("classify init_from=m data.train=[a] classify.labels=[a,a]", "classify.labels=[a,a] names a class twice"),
    Wrong("classify init_from=m data.train=a classify.labels=[a,b] classify.regression=true", "classify.labels=[a,b]"),
    Wrong("classify init_from=m data.train=[a] num_labels=3", "unknown key 'num_labels': it is set by classify.labels"),
    Wrong(f"classify init_from=POLICY data.train=a.jsonl {TINY}", "a.jsonl:1: classify takes texts with a", SAMPLES),
    Wrong("reward_model data.train=[a]", "reward_model starts from a model: init_from=FOLDER"),
    Wrong("preference data.train=[a]", "preference starts from a model, which is the reference too: init_from=FOLDER"),
    Wrong("preference init_from=base", "data.train is empty"),
    Wrong(f"{_DPO} dpo.beta=0", "dpo.beta=0.0 must be positive and finite"),
    Wrong(f"{_DPO} dpo.kind=sigmod", "dpo.kind=sigmod: did you mean 'sigmoid'?"),
    Wrong(f"{_DPO} dpo.kind=ipo dpo.label_smoothing=0.1", "dpo.label_smoothing=0.1 has no meaning for dpo.kind=ipo"),
    Wrong(f"{_DPO} dpo.label_smoothing=0.5", "dpo.label_smoothing=0.5 must be in [0, 0.5)"),
    Wrong(f"{_DPO} dpo.sft_coefficient=-1", "dpo.sft_coefficient=-1.0 must not be negative"),
    Wrong(f"{_DPO} rpo_alpha=1", "unknown key 'rpo_alpha': it is set by dpo.sft_coefficient here"),
    Wrong(f"preference init_from=POLICY data.train=a.jsonl {TINY}", "a.jsonl:1: this stage takes pairs", SAMPLES),
    Wrong("ppo init_from=base data.train=[p]", "ppo needs a reward model: reward_from=FOLDER"),
    Wrong("ppo init_from=base data.train=[p] ppo.reward=model", "or another reward: ppo.reward=NAME"),
    Wrong(f"{_PPO} engine.precision=fp64 rollout.strict=false", "engine.precision=fp64 does not go with ppo"),
    Wrong(f"{_PPO} rollout.temperature=0", "rollout.temperature=0.0 must be positive"),
    Wrong(f"{_PPO} rollout.slots=0", "rollout.slots=0 must be at least 1"),
    Wrong(f"{_PPO} ppo.gamma=2", "ppo.gamma=2.0 must be in [0, 1]"),
    Wrong("evaluate init_from=base", "evaluation.tasks is empty"),
    Wrong("evaluate init_from=b evaluation.tasks=[t] evaluation.part=dev", "evaluation.part=dev: choose train, valid"),
    Wrong("evaluate init_from=b evaluation.tasks=[t] sampling.top_p=0", "top_p=0.0 must be in (0, 1]"),
    Wrong(EVALUATE.replace("POLICY", "nowhere"), "no such folder: nowhere"),
    Wrong("pipeline", "a pipeline names its stages; start from experiment=quickstart"),
    Wrong("pipeline experiment=quickstart sft.optim.lrr=1", "unknown key 'optim.lrr'"),
    Wrong("pipeline experiment=quickstart nonsense=1", "unknown key 'nonsense'"),
    Wrong("pipeline stages=[quickstart/sfft]", "'quickstart/sfft' does not end in a stage: did you mean 'sft'?"),
    Wrong("pipeline stages=[mine/sft]", "unknown choice experiment=mine/sft"),
    Wrong(f"pipeline experiment=quickstart {QUIET} tokenizer.data.train=no.txt", "data.train: no.txt: no such file"),
    # --- batch words
    Wrong(f"{_SFT} batch.size=0", "batch.size=0 must be at least 1"),
    Wrong(f"{_SFT} batch.micro_size=5", "batch.micro_size=5 does not divide the 32 sequences"),
    Wrong(f"{_PPO} batch.size=7", "batch.size=7 does not divide rollout.prompts x rollout.samples = 32; choose 1, 2"),
    Wrong(f"{SFT} batch.size=8", "data.train makes only 1 rows, fewer than batch.size=8", SAMPLES),
    # --- cluster words
    Wrong(f"{_PPO} cluster.workers=3 cluster=ray parallel=ddp", "batch.size=32 is not divisible by 3 data ranks"),
    Wrong(f"{_PPO} cluster.workers=2", "cluster.workers=2 needs cluster=ray"),
    Wrong(f"{_PPO} cluster=kubernetes", "unknown choice cluster=kubernetes"),
    # --- names that code must have registered
    Wrong(f"{_PPO} ppo.reward=assigned_rime", "unknown reward 'assigned_rime': did you mean 'assigned_rhyme'"),
    Wrong(f"{_PPO} ppo.advantage=gea", "ppo.advantage: unknown advantage 'gea': did you mean 'gae'?"),
    Wrong(f"{_PPO} ppo.policy_loss=clipp", "ppo.policy_loss: unknown policy_loss 'clipp': did you mean 'clip'?"),
    Wrong(f"{_SFT} data.format=alpacca", "data.format: unknown data_format 'alpacca': did you mean 'alpaca'?"),
    Wrong(f"{_SFT} evaluation.tasks=[verse]", "evaluation.tasks: unknown task 'verse'"),
    Wrong(f"{_SFT} tracking.kind=wanb", "tracking.kind: unknown tracker 'wanb': did you mean 'wandb'?"),
    Wrong(  # as on a machine without the package
        f"{SFT} tracking=tensorboard extensions=[my.py]",
        'tracking=tensorboard needs a package that is not installed: pip install "framework[tensorboard]"',
        {**SAMPLES, "my.py": "import sys\nsys.modules['torch.utils.tensorboard'] = None\n"},
    ),
    # --- extensions
    Wrong(f"{_SFT} extensions=[my.py]", "extensions: no such file: my.py"),
    Wrong(f"{_SFT} extensions=[my.ppo]", "extensions: cannot import my.ppo: ModuleNotFoundError"),
    Wrong(f"{_SFT} extensions=[my.py]", "cannot import my: my.py:1: ZeroDivisionError", {"my.py": "1 / 0"}),
    Wrong(f"{_SFT} extensions=[my.py]", "cannot import my: SyntaxError", {"my.py": "def f(:"}),
    Wrong(f"{_SFT} extensions=[my.py]", "cannot import my: my.py:1: SystemExit", {"my.py": "raise SystemExit(0)"}),
    Wrong(f"{_SFT} extensions=[my.py]", "unknown kind 'rewrad': did you mean 'reward'?", extension("rewrad", "pass")),
    Wrong(f"{SFT} extensions=[my.py] data.format=mine", "a.jsonl:1: format mine: my.py:4: KeyError: 'no'",
          extension("data_format", "return x['no']")),
    Wrong(f"{SFT} extensions=[my.py] tracking.kind=mine", "tracking.kind=mine: tracker.py",
          extension("tracker", "pass")),
    Wrong(f"{SFT} extensions=[my.py] evaluation.tasks=[mine]", "evaluation.tasks: task 'mine' cannot be made: task.py",
          extension("task", "pass")),
    Wrong(f"{PPO} extensions=[my.py] ppo.reward=mine", "my.py:4: ZeroDivisionError: division by zero",
          extension("reward", "return 1 / 0", **PROMPTS), code=1),
    Wrong(f"{PPO} extensions=[my.py] ppo.reward=mine", "ppo.reward=mine gave 'good' for the response",
          extension("reward", "return 'good'", **PROMPTS), code=1),
    Wrong(f"{PPO} extensions=[my.py] ppo.advantage=mine", "ppo.advantage=mine failed: ppo.py",
          extension("advantage", "return x", **PROMPTS), code=1),
    # --- weights in
    Wrong(OWN, "no such folder: m", SAMPLES),
    Wrong(OWN, "no such folder: m", {"m": "a file", **SAMPLES}),
    Wrong(OWN, "m has no tokenizer.json", {"m": None, **SAMPLES}),
    Wrong(OWN, "tokenizer.json cannot be read", {"m": "POLICY", "m/tokenizer.json": "{}", **SAMPLES}),
    Wrong(OWN, "names no eos_token", {"m": "POLICY", "m/tokenizer_config.json": "{}", **SAMPLES}),
    Wrong(OWN, "a.jsonl:1: the chat template cannot be rendered: TemplateSyntaxError",
          {"m": "POLICY", "m/chat_template.jinja": "{% if %}", **SAMPLES}),
    Wrong(OWN, "a.jsonl:1: the chat template cannot be rendered: OverflowError",
          {"m": "POLICY", "m/chat_template.jinja": "{% for x in range(10**9) %}{% endfor %}", **SAMPLES}),
    Wrong(OWN, "m/chat_template.jinja is not UTF-8", {"m": "POLICY", "m/chat_template.jinja": b"\xff", **SAMPLES}),
    Wrong(OWN, "m/config.json is not JSON", {"m": "POLICY", "m/config.json": "{", **SAMPLES}),
    Wrong(OWN, "m/config.json must hold an object, got [1]", {"m": "POLICY", "m/config.json": "[1]", **SAMPLES}),
    Wrong(OWN, "m holds a model of type 'gpt9'", {"m": "POLICY", "m/config.json": '{"model_type": "gpt9"}', **SAMPLES}),
    Wrong(OWN, "config.json: hidden_size='32': sizes are whole numbers",
          {"m": "POLICY", "m/config.json": lambda it: it.replace(b'hidden_size": 32', b'hidden_size": "32"'),
           **SAMPLES}),
    Wrong(OWN, "m/model.safetensors cannot be read", {"m": "POLICY", "m/model.safetensors": half, **SAMPLES}, 1),
    Wrong(OWN, "m/model.safetensors.index.json names '../x.safetensors', which is no file of its folder",
          {"m": "POLICY", "m/model.safetensors": "DELETE",
           "m/model.safetensors.index.json": '{"weight_map": {"w": "../x.safetensors"}}', **SAMPLES}),
    Wrong(OWN, "a pickle can run code when it is read; save it again as safetensors",
          {"m": "POLICY", "m/model.safetensors": "DELETE", "m/pytorch_model.bin": b"", **SAMPLES}),
    Wrong(
        OWN,
        "m does not hold the model of its config.json: model.embed_tokens.weight has shape",
        {"m": "POLICY", "m/config.json": lambda it: re.sub(rb'vocab_size": \d+', b'vocab_size": 9', it), **SAMPLES},
        1,
    ),
    Wrong(f"{PRETRAIN} data.train=a.txt model.vocab_size=7", "only 7; model.vocab_size=0 has as many rows", TEXT),
    Wrong(
        OWN,
        "tokens, the model's embedding only 7; take the tokenizer that belongs to the model",
        {"m": "POLICY", "m/config.json": lambda it: re.sub(rb'vocab_size": \d+', b'vocab_size": 7', it),
         "m/model.safetensors": seven_rows, **SAMPLES},
    ),
    Wrong(
        f"{PRETRAIN} data.train=a.txt model=gpt2 model.vocab_size=0 model.max_positions=47",
        "data.max_tokens=48 is longer than the model's 47 learned positions; choose at most 47", TEXT,
    ),
    Wrong(f"{PRETRAIN} data.train=a.txt model.family=lama", "unknown family 'lama': did you mean 'llama'?", TEXT),
    Wrong(
        f"{PRETRAIN} data.train=a.txt model.window=4",
        "the Llama layout cannot hold model.window=4; it would be read as 0", TEXT,
    ),
    Wrong(f"{SFT} model.num_layers=7", "model.num_layers=7, but the model of init_from=", SAMPLES),
    Wrong(f"{_SFT} model.num_heads=30", "model.hidden_size=128 is not divisible by model.num_heads=30"),
    Wrong(PPO.replace("REWARD", "POLICY"), "has no tensor 'class_head.weight'", PROMPTS, 1),
    # --- files in
    Wrong(SFT, "data.train: a.jsonl: no such file or folder"),
    Wrong(SFT, "a.jsonl:2: malformed JSON", {"a.jsonl": lines(GOOD) + '{"instruction": "x", \n'}),
    Wrong(SFT, "data.train: a.jsonl: the file holds no record", {"a.jsonl": ""}),
    Wrong(SFT, "data.train: a.jsonl:1: a record is an object", {"a.jsonl": "[1]\n"}),
    Wrong(SFT, "data.train: a.jsonl:1: malformed JSON: maximum recursion", {"a.jsonl": "[" * 99999}),
    Wrong(SFT, "no known format has the fields body", {"a.jsonl": lines({"body": "x"})}),
    Wrong(SFT.replace("a.jsonl", "a.json"), "a.json", {"a.json": '[{"instruction": "x", "output": "y"}'}),
    Wrong(SFT.replace("a.jsonl", "a.csv"), "a.csv: cannot read '.csv'", {"a.csv": "x,y\n"}),
    Wrong(SFT.replace("a.jsonl", "a.parquet"), "not a readable .parquet file", {"a.parquet": "PAR1"}),
    Wrong(SFT.replace("a.jsonl", "d"), "d: the folder holds no .json, .jsonl, .parquet, .txt file", {"d": None}),
    Wrong(f"{PRETRAIN} data.train=a.txt", "a.txt:1: not UTF-8: byte 0xb4", {"a.txt": b"\xb4\xba"}),
    # --- formats
    Wrong(f"{PRETRAIN} data.train=a.jsonl", "a.jsonl:1: field 'text' must be a string", {"a.jsonl": '{"text": 7}\n'}),
    Wrong(f"{PRETRAIN} data.train=a.jsonl", "pretraining takes plain texts (format text or lines)", SAMPLES),
    Wrong(f"{PRETRAIN} data.train=a.txt data.format=lines", "the file holds no record", {"a.txt": "\n \n"}),
    Wrong(SFT.replace("a.jsonl", "a.txt"), "sft takes conversations", TEXT),
    Wrong(SFT, "a.jsonl:2: field 'output' must be a string, got int '7'",
          {"a.jsonl": lines(GOOD, {"instruction": "x", "output": 7})}),
    Wrong(SFT, "nothing to train", {"a.jsonl": lines({"instruction": "x", "output": " "})}),
    Wrong(SFT, "max_tokens", {"a.jsonl": lines({"instruction": "長" * 200, "output": "短"})}),
    Wrong(SFT, "a.jsonl:1: field 'tools' is not JSON", {"a.jsonl": lines({**GOOD, "tools": "{"})}),
    Wrong(SFT, "conversations[0]: unknown from 'humam': did you mean 'human'?",
          {"a.jsonl": lines({"conversations": [{"from": "humam", "value": "x"}]})}),
    Wrong(SFT, "messages[0]: 'content' has a part of type 'image_url'",
          {"a.jsonl": lines({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})}),
    Wrong(SFT, "field 'content' holds half a character",
          {"a.jsonl": lines({"messages": [{"role": "user", "content": "\ud800"}]})}),
    Wrong(f"{SFT} data.format=preference", "a.jsonl:1: needs the field 'chosen'", SAMPLES),
    Wrong(RM, "chosen and rejected are equal", {"a.jsonl": lines({"prompt": "x", "chosen": "y", "rejected": "y"})}),
    Wrong(RM, "field 'chosen' must be one assistant's turn behind the prompt",
          {"a.jsonl": lines({"chosen": "\n\nHuman: x", "rejected": "\n\nHuman: x\n\nAssistant: y"})}),
    Wrong(RM, "field 'response_rejected' must be a string",
          {"a.jsonl": lines({"question": "x", "response_chosen": "y", "response_rejected": 3})}),
    Wrong(RM, "field 'label' must be true or false, got str 'yes'",
          {"a.jsonl": lines({"prompt": "x", "completion": "y", "label": "yes"})}),
    Wrong(PPO, "field 'reward_model' must be an object with 'ground_truth'",
          {"a.jsonl": lines({"prompt": ASKED, "reward_model": 7})}),
    Wrong(PPO, "are over rollout.max_prompt_tokens=20 (the first at a.jsonl:1)",
          {"a.jsonl": lines({"prompt": "花" * 99})}),
    # --- dataset_info.json and the hub (offline)
    Wrong(INFO, "d/dataset_info.json: not JSON", {"d/dataset_info.json": "{"}),
    Wrong(INFO, "has no dataset 'x'", {"d/dataset_info.json": '{"xy": {}}'}),
    Wrong(INFO.replace("d/x", "d"), "name one of its datasets, e.g. d/x", entry(file_name="a.json")),
    Wrong(INFO, "d/b.json: no such file or folder; did you mean 'a.json'?", entry(file_name="b.json")),
    Wrong(INFO, "x: script_url is not read", entry(script_url="run.py")),
    Wrong(INFO, "x: file_name must be a string, got 7", entry(file_name=7)),
    Wrong(INFO, "x: columns must be an object, got ['q']", entry(file_name="a.json", columns=["q"])),
    Wrong(INFO, "columns must name the prompt's", entry(file_name="a.json", columns={"images": "i"})),
    Wrong(INFO, "hub:o/n: cannot be had from the hub", entry(hf_hub_url="o/n")),
    Wrong(SFT.replace("a.jsonl", "hub:nobody"), "a dataset of the hub is written hub:OWNER/NAME"),
    # --- mixtures and shares
    Wrong(f"{_SFT} data.weights=[1,2]", "data.weights has 2 entries and data.train 1"),
    Wrong(f"{_SFT} data.weights=[inf]", "data.weights=[inf] must all be positive and finite"),
    Wrong(f"{_SFT} data.temperature=-1", "data.temperature=-1.0 must be positive"),
    Wrong(f"{_SFT} data.max_epochs=[1,2,3]", "give one positive number a path of data.train, or one for all"),
    Wrong(f"{_SFT} data.valid=[b,0.1]", "data.valid=b,0.1: give files, or one share of data.train such as 0.02"),
    Wrong(f"{_SFT} data.valid=2", "data.valid=2.0 must be between 0 and 1"),
    Wrong(f"{SFT} data.valid=no.jsonl", "data.valid: no.jsonl: no such file or folder", SAMPLES),
    # --- run folders
    Wrong(SFT, "seed: 1 there, 0 now", {"runs/sft/config.yaml": "seed: 1\n", **SAMPLES}),
    Wrong(SFT, "runs/sft/config.yaml is not a recipe", {"runs/sft/config.yaml": "{", **SAMPLES}),
    Wrong(SFT, "runs/sft/config.yaml is not a recipe", {"runs/sft/config.yaml": b"\xff", **SAMPLES}),
    Wrong(SFT, "runs/sft/config.yaml is not a recipe",
          {"runs/sft/config.yaml": "!!python/object/apply:os.mkdir [pwned]", **SAMPLES}),
    Wrong(SFT, "runs/sft/status.json is not JSON", {"runs/sft/status.json": "{", **SAMPLES}),
    Wrong(SFT, "is not the status of a run: attempt is 'many'", {"runs/sft/status.json": '{"attempt": "many"}'}
          | SAMPLES),
    Wrong(SFT, "runs/sft cannot be a run folder (run.dir)", {"runs/sft": "a file", **SAMPLES}),
    Wrong(f"{SFT} run.dir=/dev/null/run", "/dev/null/run cannot be a run folder (run.dir)", SAMPLES),
    Wrong(f"{SFT} run.dir=/proc/run", "/proc/run cannot be a run folder (run.dir): /proc/run: No such file", SAMPLES),
    Wrong(f"{SFT} data.cache=a.jsonl", "cannot write prepared data to a.jsonl/", SAMPLES, 1),
    # --- sweeps
    Wrong(f"{_SFT} -m optim.lrr=1,2", "unknown key 'optim.lrr': did you mean 'optim.lr'?"),
    Wrong(f"{_SFT} -m learning_rate=1,2", "unknown key 'learning_rate': it is set by optim.lr here"),
    Wrong(f"{_SFT} -m hydra/sweeper=optunna", "unknown choice hydra/sweeper=optunna: basic is there; optuna comes"),
    Wrong("pipeline experiment=quickstart -m seed=1,2", "-m sweeps one stage; a pipeline is no stage"),
    # --- tools
    Wrong("explain", "explain takes the words of a stage"),
    Wrong("explain nope", "unknown stage 'nope'"),
    Wrong(f"explain {_SFT} batch.size=0", "batch.size=0 must be at least 1"),
    Wrong("slurm", "slurm takes a stage and its words: sbatch launch/slurm pretrain experiment=..."),
    Wrong("slurm pretrian", "unknown stage 'pretrian': did you mean 'pretrain'?"),
    Wrong("slurm sft init_from=base", "data.train is empty; name files or folders: data.train=[a.jsonl]"),
    Wrong(f"slurm {_SFT}", "SLURM_JOB_ID is not set: this is no job of Slurm's; submit one: sbatch launch/slurm"),
    Wrong("doctor now", "doctor takes cluster.workers=N and device=NAME, got: now"),
    Wrong("doctor cluster.workers=many", "cluster.workers=many: choose auto, or a number of processes from 1 on"),
    Wrong("generate nowhere x", "nowhere holds no model"),
    Wrong("generate x --temprature 1", "unrecognized arguments"),
    Wrong("generate POLICY x --max-tokens 0", "max_tokens=0 must be at least 1"),
    Wrong("generate POLICY x --device tpu", "argument --device: invalid choice: 'tpu'"),
    Wrong("chat", "the following arguments are required: model"),
    Wrong("chat nowhere", "nowhere holds no model"),
    Wrong("data", "framework data: a verb is missing: Choose one of: check, prepare, stats"),
    Wrong("data chek a", "framework data: chek: did you mean 'check'?"),
    Wrong("data check", "framework data: the following arguments are required: path"),
    Wrong("data check nowhere", "framework data: nowhere: no such file or folder"),
    Wrong("data stats a.jsonl --tokenizer nowhere", "no such tokenizer folder: nowhere", SAMPLES),
    Wrong("data stats a.jsonl --format alpca", "unknown data_format 'alpca': did you mean 'alpaca'?", SAMPLES),
    Wrong("data prepare", "framework data: data prepare takes the words of a stage"),
    Wrong("data prepare sft init_from=t data.trian=a", "did you mean 'data.train'?"),
    Wrong("data prepare sft init_from=POLICY data.train=b", "data.train: b: no such file or folder"),
    Wrong("data prepare evaluate init_from=b evaluation.tasks=[t]", "data prepare evaluate: Choose one of: classify"),
    Wrong("status", "status takes a run folder"),
    Wrong("status nowhere", "nowhere is not a run folder"),
    Wrong("status a.txt", "a.txt is not a run folder", TEXT),
    Wrong("status r", "r/status.json is not the status of a run: [1]", {"r/status.json": "[1]"}),
    Wrong("status r", "is not the status of a run: total is 'x'", {"r/status.json": '{"total": "x"}'}),
    Wrong("report nowhere", "nowhere is not a run folder"),
    Wrong("models compar gpt2", "unknown verb 'compar': did you mean 'compare'?"),
    Wrong("models compare lama-7b", "'lama-7b' is neither a preset nor a model folder: did you mean 'llama-7b'?"),
    Wrong("report r", "Is a directory", {"r/status.json": "{}", "r/report.html": None}, 1),
    Wrong("compare r", "the following arguments are required: RUN"),
    Wrong("compare r nowhere", "nowhere is not a run folder", {"r/status.json": "{}", "r/config.yaml": "a: 1"}),
    Wrong("compare r r --html a.txt/x.html", "a.txt", {"r/status.json": "{}", "r/config.yaml": "a: 1", **TEXT}, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Where POLICY and REWARD are."""
    return dict(zip(("POLICY", "REWARD"), model_folders(tmp_path_factory.mktemp("models"))))


def write(folder: Path, files: Mapping[str, Content], models: Mapping[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif content in models:
            shutil.copytree(models[str(content)], path)
        elif content == "DELETE":
            path.unlink()
        elif callable(content):
            path.write_bytes(content(path.read_bytes()))
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def content_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def half_written(name: str) -> bool:
    """What is only there while something is being written; the marker of an attempt stays with its run."""
    part = Path(name)
    hidden = part.name.startswith(".") and not part.name.startswith(".attempt-")
    return hidden or part.suffix in (".partial", ".new", ".lock")


def errors(printed: str) -> list[str]:
    """The lines of stderr that are no progress."""
    return [line for line in printed.splitlines() if line.strip() and not line.startswith("preparing ")]


@pytest.mark.parametrize(
    ("number", "row"),
    list(enumerate(ROWS)),
    ids=[f"{n}: {row.words[:40]}: {row.line[:40]}" for n, row in enumerate(ROWS)],
)
def test_a_wrong_use_gets_one_clear_line(tmp_path: Path, models: Mapping[str, str], number: int, row: Wrong) -> None:
    write(tmp_path, row.files, models)
    before = content_of(tmp_path)
    words = [re.sub("POLICY|REWARD", lambda name: models[name[0]], word) for word in shlex.split(row.words)]
    # Every tenth as a user's shell would start it; Ray does not go through a fork.
    fresh = number % 10 == 0 or "cluster=ray" in words
    done = (framework if fresh else forked)(*words, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == row.code, done.stderr
    (error,) = errors(done.stderr)
    assert error.startswith(f"framework {words[0]}: ")
    assert row.line in error
    assert "Traceback" not in done.stdout
    after = content_of(tmp_path)
    assert not [name for name in after.keys() - before.keys() if half_written(name)]
    assert {name: after[name] for name in before} == before
    if row.code == 2:  # a refused run never was; what was prepared on the way is whole, and is found again
        assert not [name for name in after.keys() - before.keys() if not re.match("runs$|runs/prepared|runs/ppo", name)]


def test_every_stage_and_tool_is_used_wrongly() -> None:
    from framework.main import TOOLS
    from framework.stages.config import STAGES

    assert {*STAGES, *TOOLS} <= {row.words.partition(" ")[0] for row in ROWS}
