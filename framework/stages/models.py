"""`framework models [axes | compare NAME...]`: families and presets, every axis with its source, models side by side.

Left out: weights. What a preset is needs no torch; of a model folder only config.json is read, by `models.hub`.
"""

from collections.abc import Callable, Iterable, Sequence

from framework.core.errors import UsageError, nearest
from framework.core.places import local
from framework.core.registry import lookup, names
from framework.engine.flops import forward_flops
from framework.models import families  # noqa: F401  (they enter themselves into the registry)
from framework.models.axes import axes
from framework.models.config import Bias, ModelConfig, Position, Scaling
from framework.models.families.family import Family
from framework.models.presets import preset, presets
from framework.planning.parameters import active_parameters, kv_bytes, num_parameters
from framework.stages.words import Words

_V = "V: the tokenizer's vocabulary"


def models(words: list[str]) -> int:
    """Print one of the three; returns 0."""
    chosen = _parser().parse_args(words)
    if chosen.verb not in ("", "axes", "compare"):
        raise UsageError(f"unknown verb '{chosen.verb}': {nearest(chosen.verb, ['axes', 'compare'])}")
    if chosen.verb != "compare" and chosen.name:
        raise UsageError(f"{' '.join(chosen.name)}: only compare takes names: framework models compare NAME...")
    if chosen.verb == "compare" and not chosen.name:
        raise UsageError("compare takes presets or model folders: framework models compare llama-2-7b bloom-7b")
    lines = {"": listing, "axes": axis_lines}.get(chosen.verb, lambda: comparison(chosen.name))
    print("\n".join(lines()))
    return 0


def _parser() -> Words:
    parser = Words("framework models", description="the architectures: families, presets, axes, comparisons")
    parser.add_argument("verb", nargs="?", default="", help="axes: every key below model; compare: models side by side")
    parser.add_argument("name", metavar="NAME", nargs="*", help="of compare: a preset or a model folder")
    return parser


# --- the list ------------------------------------------------------------------------------------------------------


def listing() -> list[str]:
    """The families with what they cover, the presets with their sizes."""
    known: list[Family] = [lookup("family", name) for name in names("family")]
    rows = [[f.model_type, f.causal.format(f.name), f.covers] for f in known]
    head = ["preset", "family", "parameters", "layers", "hidden", "heads/kv", "context"]
    configs = {name: preset(name) for name in presets()}
    by_family = sorted(configs, key=lambda name: (configs[name].family, num_parameters(configs[name]), name))
    sizes = [[name, *_sizes(configs[name])] for name in by_family]
    return [
        "families: folders that are read (init_from=FOLDER), trained and written",
        *_table([["model_type", "transformers", "covers"], *rows]),
        "",
        f"presets: framework pretrain model=NAME begins one from nothing ({_V})",
        *_table([head, *sizes], right=2),
        "",
        "framework models compare NAME... | framework models axes",
    ]


def _sizes(model: ModelConfig) -> list[str]:
    heads = f"{model.num_heads}/{model.kv_heads}"
    return [model.family, _parameters(model), *map(_number, (model.num_layers, model.hidden_size)), heads,
            _number(model.max_positions)]  # fmt: skip


# --- the axes ------------------------------------------------------------------------------------------------------


def axis_lines() -> list[str]:
    """Each axis: default, meaning, choices."""
    lines = [" ".join((ModelConfig.__doc__ or "").split()), ""]
    for axis in axes():
        lines.append(f"{axis.key}={axis.default}  {axis.meaning}")
        lines += _table([[f"    {value}", meaning] for value, meaning in axis.choices])
    return lines


# --- models side by side -------------------------------------------------------------------------------------------


def comparison(given: Iterable[str]) -> list[str]:
    """A row a fact, a column a model."""
    found = {name: find(name) for name in given}
    rows = [[fact, *(tell(model) for model in found.values())] for fact, tell in _FACTS.items()]
    note = [_V] if any(model.vocab_size == 0 for model in found.values()) else []
    return _table([["", *found], *rows]) + note


def find(name: str) -> ModelConfig:
    """The preset of that name, or what the config.json of a folder says."""
    if name in presets():
        return preset(name)
    if not local(name).is_dir():
        hint = nearest(name, presets())
        raise UsageError(f"'{name}' is neither a preset nor a model folder: {hint} `framework models` lists them")
    from framework.models.hub import read_architecture  # torch

    return read_architecture(local(name))[0]


def _parameters(model: ModelConfig, count: Callable[[ModelConfig], int] = num_parameters) -> str:
    return _with_vocabulary(model, count(model), model.hidden_size * (1 if model.tied else 2))


def _with_vocabulary(model: ModelConfig, number: int, each: int) -> str:
    """`number`, which lacks `each` for every token of a vocabulary that is not yet known."""
    return _number(number) if model.vocab_size else f"{_number(number)} + {_number(each)} V"


def _heads(model: ModelConfig) -> str:
    return f"{model.num_heads} / {model.kv_heads} x {model.head_size}"


def _positions(model: ModelConfig) -> str:
    if model.position is not Position.ROTARY:
        return str(model.position).replace("_", " ")
    part = f", {model.rope_fraction:g} of a head" if model.rope_fraction < 1 else ""
    return f"rotary{part}{', interleaved' if model.rope_interleaved else ''}"


def _theta(model: ModelConfig) -> str:
    return f"{model.rope_theta:,.10g}" if model.rotary_parts else "-"


def _scaling(model: ModelConfig) -> str:
    scaling = model.rope_scaling
    if model.position is not Position.ROTARY or scaling.kind is Scaling.NONE:
        return "-"
    since = f" from {_number(scaling.original_positions)}" if scaling.original_positions else ""
    return f"{scaling.kind}, {scaling.factor:g} x{since}"


def _window(model: ModelConfig) -> str:
    since = f" from layer {model.window_from}" if model.window_from else ""
    return f"{_number(model.window)}{since}" if model.window else "-"


def _norm(model: ModelConfig) -> str:
    also = [word for word, has in (("embedding", model.embedding_norm), ("q and k", model.qk_norm)) if has]
    return f"{model.norm} {model.norm_eps:g}, {model.norm_place}" + "".join(f" + {word}" for word in also)


def _experts(model: ModelConfig) -> str:
    moe = model.moe
    if not moe.experts:
        return "-"
    shared = f" + {_number(moe.shared)} shared" if moe.shared else ""
    layers = sum(map(moe.at, range(model.num_layers)))
    where = "" if layers == model.num_layers else f", in {layers} layers"
    return f"{moe.top_k} of {moe.experts} x {_number(model.expert_size)}{shared}{where}"


def _biases(model: ModelConfig) -> str:
    attention = {Bias.NONE: [], Bias.QKV: ["q k v"], Bias.ALL: ["attention"]}[model.attention_bias]
    return ", ".join([*attention, *(["feed-forward"] if model.mlp_bias else [])]) or "none"


def _ends(model: ModelConfig) -> str:
    return ("tied" if model.tied else "apart") + (", transform and bias" if model.head_transform else "")


def _flops(model: ModelConfig, keys: int) -> str:
    return _with_vocabulary(model, forward_flops(model, keys), 2 * model.hidden_size)


def _number(value: int) -> str:
    return f"{value:,}"


_FACTS: dict[str, Callable[[ModelConfig], str]] = {
    "family": lambda model: model.family,
    "architecture": lambda model: str(model.architecture),
    "parameters": _parameters,
    "  that a token meets": lambda model: _parameters(model, active_parameters),
    "vocabulary": lambda model: _number(model.vocab_size) if model.vocab_size else "V",
    "layers": lambda model: _number(model.num_layers),
    "hidden": lambda model: _number(model.hidden_size),
    "heads / kv heads x size": _heads,
    "positions": _positions,
    "rotary theta": _theta,
    "rotary scaling": _scaling,
    "window": _window,
    "norm": _norm,
    "feed-forward": lambda model: f"{model.activation}, {_number(model.feed_forward_size)}",
    "experts": _experts,
    "biases": _biases,
    "embedding and head": _ends,
    "context": lambda model: _number(model.max_positions),
    "KV bytes a token, bf16": lambda model: _number(kv_bytes(model)) if kv_bytes(model) else "-",
    "FLOPs a token, forward": lambda model: _flops(model, 0),
    "  with a full context": lambda model: _flops(model, model.max_positions),
}


def _table(rows: Sequence[Sequence[str]], right: int | None = None) -> list[str]:
    """Columns two spaces apart, those from `right` on aligned on that side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = len(widths) if right is None else right

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if column >= first else text.ljust(widths[column])

    return ["  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in rows]
