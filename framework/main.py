"""The command line: words become one frozen RunConfig a stage, and the stage runs. The only page that knows Hydra.

Nothing heavy is imported before a recipe has been accepted, so help and refusals come at once.
"""

import dataclasses
import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from framework.core.config import flatten, recipes_folder
from framework.core.errors import FrameworkError, Interrupted, LeftAtOnce, UsageError, nearest
from framework.core.signals import stop_request
from framework.stages.config import STAGES, PipelineRun, RunConfig
from framework.stages.peers import ours_for

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
        "RUN RUN: what differs: recipe, origin, figures, curves, and from which step on the weights",
    ),
    "report": ("watch", "RUN: write report.html again from what lies in the run folder"),
    "doctor": ("doctor", "what this installation can do, and what is missing"),
}
_COMPOSING = ("explain", "data")  # tools that take the words of a stage
_SWEEP_WORDS = ("-m", "--multirun")


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
    except KeyboardInterrupt as error:
        print(f"framework {words[0]}: {str(error) or 'interrupted'}", file=sys.stderr)
        return error.exit_code if isinstance(error, LeftAtOnce) else 130


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
    if stage != "pipeline":
        return (_compose_one(stage, overrides),)
    own, forwarded = _split_pipeline_words(overrides)
    pipeline = _compose_one("pipeline", own)
    assert isinstance(pipeline, PipelineRun)
    return (pipeline, *(_compose_member(pipeline, member, forwarded) for member in pipeline.stages))


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
        raise UsageError(_explain_refusal(stage, error)) from None


def _typed(composed: Any) -> RunConfig:
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


def _store_schemas() -> None:
    """Enter every stage's dataclass as `schema/STAGE`, thawed: OmegaConf makes frozen dataclasses read-only."""
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
    if value and not value.startswith(("[", "$")) and isinstance(_defaults(stage).get(key), list):
        return f"{key}=[{value}]"
    return word


def _defaults(stage: str) -> dict[str, Any]:
    """Every key of a stage with its default, dotted."""

    def tree(schema: Any) -> dict[str, Any]:
        found = {}
        for field in dataclasses.fields(schema):
            factory = field.default_factory
            value = field.default if factory is dataclasses.MISSING else factory()
            found[field.name] = tree(value) if dataclasses.is_dataclass(value) else value
        return found

    return flatten(tree(STAGES[stage]))


def _explain_refusal(stage: str, error: Exception) -> str:
    """Hydra's and OmegaConf's many-line errors as one line that names the key, the value and what would work."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException):
        return _unknown_choice(str(error))
    text = str(error.__cause__ or error)
    full = re.search(r"full_key: (\S+)", text)
    key = full.group(1) if full else ""
    missing = re.search(r"Key '([^']+)' (?:is )?not in", text)
    if missing:
        return _unknown_key(stage, key or missing.group(1))
    choice = re.search(r"Invalid value '([^']*)', expected one of \[([^\]]*)\]", text)
    if choice:
        return f"{key}={choice.group(1)}: {nearest(choice.group(1).lower(), choice.group(2).lower().split(', '))}"
    kind = re.search(r"Value '([^']*)' .*could not be converted to (\w+)", text)
    if kind:
        return f"{key}={kind.group(1)} is not {_KINDS.get(kind.group(2), kind.group(2))}"
    if key and "is not a ListConfig" in text:
        return f"{key} takes a list: {key}=[a,b]"
    malformed = re.search(r"Error parsing override '([^']*)'", str(error))
    if malformed:
        return f"'{malformed.group(1)}' is not of the form key=value"
    first = text.splitlines()[0] if key else " ".join(str(error).split("\nSee https")[0].split())
    return f"{key}: {first}" if key else first


_KINDS = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}


def _unknown_key(stage: str, key: str) -> str:
    known = _defaults(stage)
    if ours := ours_for(key, {*known, *_groups()}):
        return f"unknown key '{key}': it is set by {ours} here. `framework {stage} --help` lists the keys"
    sections = {name.partition(".")[0] for name in known}
    hint = nearest(key, sections if "." not in key else known).split(" Choose")[0]
    return f"unknown key '{key}': {hint} `framework {stage} --help` lists them"


def _refuse_strangers(stage: str, words: Sequence[str]) -> None:
    """What Hydra would take, or refuse without naming ours: `+key=value` (every key is there already, so an addition is
    a misspelling), and other frameworks' words, `--learning_rate` among them."""
    known = {*_defaults(stage), *_groups()}
    for word in words:
        key = re.split(r"[@=]", word.lstrip("+~-"))[0]
        if key not in known and (word.startswith("+") or ours_for(key, known)):
            raise UsageError(_unknown_key(stage, key))


def _unknown_choice(text: str) -> str:
    asked = re.search(r"Could not find '([^']+)'", text)
    if asked is None:
        return text.splitlines()[0]
    group, _, choice = asked.group(1).rpartition("/")
    if group in _PLUGINS:
        return f"unknown choice {group}={choice}: {_PLUGINS[group]}"
    group, _, choice = asked.group(1).partition("/")
    folder = recipes_folder() / group
    if not folder.is_dir():
        return f"unknown group '{group}': {nearest(group, _groups())}"
    choices = [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]
    return f"unknown choice {group}={choice}: {nearest(choice, choices)}"


# group of Hydra's own -> which package brings its choices
_PLUGINS = {
    "hydra/sweeper": 'basic is there; optuna comes with pip install "framework[sweep]"',
    "hydra/launcher": 'basic is there; submitit_local and submitit_slurm come with pip install "framework[submitit]"',
}


def _groups_of(stage: str) -> set[str]:
    """The groups that a stage's recipe chooses from."""
    import yaml

    recipe = yaml.safe_load((recipes_folder() / f"{stage}.yaml").read_text(encoding="utf-8"))
    return {name for entry in recipe["defaults"] if isinstance(entry, dict) for name in entry}


def _groups() -> list[str]:
    return [path.name for path in recipes_folder().iterdir() if path.is_dir() and path.name not in ("corpora", "sweep")]


def _sweep(stage: str, words: list[str]) -> int:
    """`-m`: several runs of a stage, by Hydra's own sweeper or the one named (hydra/sweeper=optuna)."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

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
    sys.argv = ["framework", *(_as_list(stage, word) for word in words), *quiet]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed
    try:
        hydra.main(version_base="1.3", config_path=str(recipes_folder()), config_name=stage)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain_refusal(stage, error)) from None
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
        raise UsageError(f"stages: '{member}' does not end in a stage: {nearest(stage, STAGES)}")
    fields = {field.name for field in dataclasses.fields(STAGES[stage])}
    members = {entry.rpartition("/")[2] for entry in pipeline.stages}
    words = [f"experiment={member}", f"run.root={pipeline.run.dir}"]
    for word in forwarded:
        head, dot, rest = word.partition(".")
        key = re.split(r"[.=]", word)[0]
        if dot and head in members and "=" not in head:
            words += [rest] if head == stage else []
        elif key in fields and key != "run":
            is_choice = key in _groups() and not word.startswith(f"{key}.")
            words += [word] if not is_choice or key in _groups_of(stage) else []
        elif not any(key in {f.name for f in dataclasses.fields(STAGES[m])} for m in members):
            keys = {name for member in members for name in _defaults(member)}
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
    if any(word in ("-h", "--help") for word in words):
        print(_stage_help(stage))
        return 0
    words = words[1:] if stage == "tokenizer" and words[:1] == ["train"] else words
    with stop_request():  # from here on, though the stage will need seconds to import what it needs
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
    keys = "\n".join(f"  {key}={_shown(value)}" for key, value in sorted(_defaults(stage).items()) if key != "stage")
    groups = "\n".join(f"  {group}={'|'.join(_choices(group))}" for group in sorted(_groups_of(stage) & set(_groups())))
    return f"framework {stage}: {STAGES[stage].__doc__}\n\ngroups\n{groups}\n\nkeys and defaults\n{keys}"


def _choices(group: str) -> list[str]:
    folder: Path = recipes_folder() / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    entry()
