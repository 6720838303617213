"""The command line: words become one frozen RunConfig a stage, and the stage runs. The only page that knows Hydra.

Nothing heavy is imported before a recipe has been accepted, so help and refusals come at once.
"""

import dataclasses
import functools
import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from framework.core.config import recipes_folder
from framework.core.deadline import ending
from framework.core.errors import FrameworkError, Interrupted, LeftAtOnce, UsageError, nearest
from framework.core.signals import stop_request
from framework.stages.config import STAGES, PipelineRun, RunConfig
from framework.stages.peers import ours_for
from framework.stages.refusal import defaults_of, explain_refusal, groups, groups_of, unknown_key

if TYPE_CHECKING:
    from framework.stages.job import Run

# tool -> (module of framework.stages, what it does)
TOOLS = {
    "explain": ("plan", "STAGE WORDS...: the resolved recipe, the batch arithmetic, the memory; starts nothing"),
    "generate": ("serve", "MODEL [PROMPT...]: sample from a finished model"),
    "chat": ("serve", "MODEL: talk to a finished model"),
    "data": ("data", "check|prepare|stats ...: look at data, count it, prepare it ahead"),
    "status": ("watch", "RUN: where a run stands"),
    "compare": (
        "compare",
        "RUN RUN: what differs: recipe, origin, figures, curves, and the first step, tensor and rank",
    ),
    "models": (
        "models",
        "[axes | compare NAME...]: families and presets; each axis, its formula and source; models side by side",
    ),
    "report": ("watch", "RUN: write report.html again from what lies in the run folder"),
    "slurm": ("slurm", "STAGE WORDS...: the stage on all nodes of this Slurm job; sbatch launch/slurm calls it"),
    "doctor": (
        "doctor",
        "what this installation can do, and what is missing; cluster.workers=N: whether so many ranks are fit",
    ),
}
_COMPOSING = ("explain", "data", "slurm")  # tools that take the words of a stage
_SWEEP_WORDS = ("-m", "--multirun")
_TOKENIZER_VERBS = ("train", "extend", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """The `framework` command. Returns 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    try:
        return _command(words[0])(words[1:])
    except FrameworkError as error:
        print(f"framework {words[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has left: `framework status RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written, a file where a folder should be
        print(f"framework {words[0]}: {_place_and_reason(error)}", file=sys.stderr)
        return FrameworkError.exit_code
    except KeyboardInterrupt as error:
        print(f"framework {words[0]}: {str(error) or 'interrupted'}", file=sys.stderr)
        return error.exit_code if isinstance(error, LeftAtOnce) else 130


def _place_and_reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def entry() -> NoReturn:
    """What the installed command calls."""
    sys.exit(main())


def run(stage: str, overrides: Sequence[str] = ()) -> "Run":
    """Run a stage from Python: `framework.run("sft", ["init_from=base/", "data.train=[a.jsonl]"])`.

    Returns the finished run: its folder and its summary. Raises FrameworkError where the command would exit non-zero.
    """
    return run_stage(compose(stage, overrides))


def run_stage(configs: tuple[RunConfig, ...]) -> "Run":
    """Run composed configs: a pipeline's tuple goes through `stages.pipeline`, a single one through its own stage."""
    if len(configs) == 1:
        from framework.stages.launch import launch

        return launch(configs[0])
    finished: Run = importlib.import_module("framework.stages.pipeline").run(configs[0], configs[1:])
    return finished


def compose(stage: str, overrides: Sequence[str]) -> tuple[RunConfig, ...]:
    """Words to frozen configs: one for a stage; for a pipeline its own and then one for each of its stages."""
    if stage not in STAGES:
        raise UsageError(f"unknown stage '{stage}': {nearest(stage, STAGES)}")
    overrides = _without_verb(stage, overrides)
    if stage != "pipeline":
        return (_compose_one(stage, overrides),)
    own, forwarded = _split_pipeline_words(overrides)
    pipeline = _compose_one("pipeline", own)
    assert isinstance(pipeline, PipelineRun)
    return (pipeline, *(_compose_member(pipeline, member, forwarded) for member in pipeline.stages))


def _without_verb(stage: str, words: Sequence[str]) -> list[str]:
    """The stage's own words: `tokenizer train a=b` says `a=b`, and `tokenizer extend FOLDER a=b`
    `init_from=FOLDER a=b`, in quotes, so that no path is read as Hydra's grammar."""
    verb, rest = (words[0], list(words[1:])) if words else ("", [])
    if stage != "tokenizer" or not verb or "=" in verb or verb.startswith(("-", "~", "+")):
        return list(words)
    if verb not in _TOKENIZER_VERBS:
        raise UsageError(f"tokenizer {verb}: {nearest(verb, _TOKENIZER_VERBS)}")
    if verb == "compare":
        raise UsageError("tokenizer compare has no recipe: framework tokenizer compare FOLDER... --file FILE")
    if verb == "train":
        return rest
    if not rest or "=" in rest[0]:
        raise UsageError("tokenizer extend takes what it extends: framework tokenizer extend FOLDER data.train=[a.txt]")
    quoted = rest[0].replace("\\", "\\\\").replace("'", "\\'")
    return [f"init_from='{quoted}'", *rest[1:]]


# --- Hydra ---------------------------------------------------------------------------------------------------------


def _compose_one(stage: str, overrides: Sequence[str]) -> RunConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    _refuse_strangers(stage, overrides)
    _store_schemas()
    words = [_as_list(stage, word) for word in overrides]
    try:
        with initialize_config_dir(str(recipes_folder()), version_base="1.3"):
            return _typed(hydra_compose(stage, overrides=words))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain_refusal(stage, error)) from None


def _typed(composed: Any) -> RunConfig:
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


@functools.cache
def _store_schemas() -> None:
    """Enter every stage's dataclass as `schema/STAGE`, thawed: OmegaConf makes frozen dataclasses read-only. Once a
    process, for it takes longer than the composing; Hydra hands out copies."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for stage, schema in STAGES.items():
        node = OmegaConf.structured(schema)
        _thaw(node)
        node.stage = stage
        ConfigStore.instance().store(name=stage, node=node, group="schema")


def _thaw(node: Any) -> None:
    from omegaconf import DictConfig, OmegaConf

    OmegaConf.set_readonly(node, None)
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            _thaw(child)


def _as_list(stage: str, word: str) -> str:
    """`data.train=a.jsonl` means `data.train=[a.jsonl]` where the key holds a list."""
    key, _, value = word.partition("=")
    if value and not value.startswith(("[", "$")) and isinstance(defaults_of(stage).get(key), list):
        return f"{key}=[{value}]"
    return word


def _refuse_strangers(stage: str, words: Sequence[str]) -> None:
    """Words that are none of ours, before Hydra sees them: it would take `+key=value`, and refuse the others without
    naming ours, a sweep's only after it has written its folder. `--learning_rate` is among them."""
    known = {*defaults_of(stage), *groups()}
    for word in words:
        key = re.split(r"[@=]", word.lstrip("+~-"))[0]
        if key == "stage":
            raise UsageError(f"'{word}': the command names the stage: framework {word.rpartition('=')[2]} ...")
        is_section = any(name.startswith(f"{key}.") for name in known)
        is_strange = not (key in known or is_section or key.startswith("hydra"))
        if (not key or word.startswith("-") or (word[0] != "~" and "=" not in word)) and not ours_for(key, known):
            raise UsageError(f"'{word}' is not of the form key=value")
        if is_strange:
            raise UsageError(unknown_key(stage, key))


def _sweep(stage: str, words: list[str]) -> int:
    """`-m`: several runs of a stage, by Hydra's own sweeper or the one named (hydra/sweeper=optuna)."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    words = _without_verb(stage, [word for word in words if word not in _SWEEP_WORDS])
    if stage == "pipeline":
        raise UsageError("-m sweeps one stage; a pipeline is no stage: sweep sft, ppo, ...")

    def job(composed: Any) -> float | None:
        config = _typed(composed)
        paths = dataclasses.replace(config.run, dir=f"{config.run.dir}-{HydraConfig.get().job.num}")
        try:
            finished = run_stage((dataclasses.replace(config, run=paths),))
        except Interrupted as error:  # ends the sweep; another failure is told once the other jobs have run
            print(f"framework {stage}: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        return finished.figure(config.objective) if config.objective else None

    if "hydra/launcher=submitit_slurm" in words and shutil.which("srun") is None:
        raise UsageError(
            "hydra/launcher=submitit_slurm needs Slurm's srun on PATH; here: hydra/launcher=submitit_local"
        )
    _refuse_strangers(stage, words)
    _store_schemas()
    quiet = ["hydra.output_subdir=null", "hydra.sweep.subdir=.", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    if not any(word.startswith("hydra.sweep.dir=") for word in words):
        quiet.append("hydra.sweep.dir=runs/sweep")
    sys.argv = ["framework", "-m", *(_as_list(stage, word) for word in words), *quiet]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed
    try:
        hydra.main(version_base="1.3", config_path=str(recipes_folder()), config_name=stage)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain_refusal(stage, error)) from None
    return 0


# --- pipelines -----------------------------------------------------------------------------------------------------


def _split_pipeline_words(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The pipeline's own words, and those for its stages. `run`, `seed`, ... belong to both."""
    own, forwarded = [], []
    for word in overrides:
        head = re.split(r"[.=]", word.lstrip("+~"))[0]
        if head in {field.name for field in dataclasses.fields(PipelineRun)} | {"experiment"}:
            own.append(word)
        if head not in ("experiment", "stages", "name", "stage"):
            forwarded.append(word)
    return own, forwarded


def _compose_member(pipeline: PipelineRun, member: str, forwarded: list[str]) -> RunConfig:
    stage = member.rpartition("/")[2]
    if stage not in STAGES or stage == "pipeline":
        known = [name for name in STAGES if name != "pipeline"]
        raise UsageError(f"stages: '{member}' does not end in a stage: {nearest(stage, known)}")
    fields = {field.name for field in dataclasses.fields(STAGES[stage])}
    members = {entry.rpartition("/")[2] for entry in pipeline.stages}
    words = [f"experiment={member}", f"run.root={pipeline.run.dir}"]
    for word in forwarded:
        head, dot, rest = word.partition(".")
        key = re.split(r"[.=]", word)[0]
        if dot and head in members and "=" not in head:
            words += [rest] if head == stage else []
        elif key in fields and key != "run":
            is_choice = key in groups() and not word.startswith(f"{key}.")
            words += [word] if not is_choice or key in groups_of(stage) else []
        elif not any(key in {f.name for f in dataclasses.fields(STAGES[m])} for m in members):
            keys = {name for member in members for name in defaults_of(member)}
            ours = ours_for(key, keys)
            hint = f"it is set by {ours} here" if ours else nearest(key, members | fields)
            raise UsageError(f"unknown key '{key}': {hint}")
    return _in_group(_compose_one(stage, words), pipeline.tracking.group or pipeline.name)


def _in_group(config: RunConfig, group: str) -> RunConfig:
    """The stages of a pipeline stand together at a tracker, unless a recipe says where."""
    tracking = dataclasses.replace(config.tracking, group=config.tracking.group or group)
    return dataclasses.replace(config, tracking=tracking)


# --- commands ------------------------------------------------------------------------------------------------------


def _command(name: str) -> Callable[[list[str]], int]:
    if name in STAGES:
        return lambda words: _run_command(name, words)
    if name in TOOLS:
        return lambda words: _run_tool(name, words)
    raise UsageError(f"unknown command '{name}': {nearest(name, [*STAGES, *TOOLS])}")


def _run_tool(name: str, words: list[str]) -> int:
    module = importlib.import_module(f"framework.stages.{TOOLS[name][0]}")
    given = (words, compose) if name in _COMPOSING else (words,)
    status: int = getattr(module, name)(*given)
    return status


def _run_command(stage: str, words: list[str]) -> int:
    if stage == "tokenizer" and words[:1] == ["compare"]:
        compared: int = importlib.import_module("framework.stages.vocabularies").compare(words[1:])
        return compared
    if any(word in ("-h", "--help") for word in words):
        print(_stage_help(stage))
        return 0

    def told(error: FrameworkError) -> None:
        print(f"framework {stage}: {error}", file=sys.stderr)

    with stop_request(), ending(told):  # from here on, though the stage will need seconds to import what it needs
        if any(word in _SWEEP_WORDS for word in words):
            return _sweep(stage, words)
        run_stage(compose(stage, words))
    return 0


def _help() -> str:
    def first_line(schema: type) -> str:
        return (schema.__doc__ or "").splitlines()[0]

    stages = "\n".join(f"  {name:<14}{first_line(schema)}" for name, schema in STAGES.items())
    tools = "\n".join(f"  {name:<14}{text}" for name, (_, text) in TOOLS.items())
    return (
        "framework: pretraining and RLHF from one recipe, on a laptop CPU or a cluster.\n\n"
        "  framework STAGE [group=choice] [key=value] ...      framework STAGE --help lists the keys\n"
        "  framework TOOL ...\n\n"
        f"stages\n{stages}\n\ntools\n{tools}\n\n"
        "start here: framework pipeline experiment=quickstart\n"
        "-m sweeps: framework sft -m optim.lr=1e-3,3e-3 ...\n"
        "exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 130 interrupted, 143 terminated"
    )


def _stage_help(stage: str) -> str:
    said = ("stage", "parallel.name", "cluster.kind")  # by the stage's name and by groups
    defaults = {key: value for key, value in sorted(defaults_of(stage).items()) if key not in said}
    folded = {"model.AXIS": "axes of the architecture: framework models axes"}
    if stage == "ppo":
        folded["lora.KEY"] = "keys of an adapter: framework sft --help"
        folded["ops.KEY"] = "keys, whose operators run: framework sft --help"
    groups = {name.partition(".")[0]: name for name in folded}
    lines = [f"  {key}={_shown(value)}" for key, value in defaults.items() if key.partition(".")[0] not in groups]
    for group, name in groups.items():
        if number := sum(key.startswith(f"{group}.") for key in defaults):
            lines.append(f"  {name}=...  {number} {folded[name]}")
    keys = "\n".join(sorted(lines))
    choices = "\n".join(f"  {group}={'|'.join(_choices(group))}" for group in groups_of(stage))
    return f"framework {stage}: {STAGES[stage].__doc__}\n\ngroups\n{choices}\n\nkeys and defaults\n{keys}"


def _choices(group: str) -> list[str]:
    folder: Path = recipes_folder() / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    entry()
