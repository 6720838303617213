"""How our axes stand in a config.json: small tables that read and write, one a family.

A setting reads some axes out of their keys and writes them back. What a family cannot say of our axes is found by
reading back what was written; what we cannot say of its keys is refused by name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from framework.core.errors import UsageError
from framework.models.config import Activation, ModelConfig, MoeConfig, RopeScaling, Scaling

Keys = Mapping[str, Any]
REQUIRED = object()


class Setting(Protocol):
    """Axes of ours as keys of theirs."""

    def read(self, theirs: Keys) -> dict[str, Any]:
        """{axis: value}; UsageError for a value that we cannot hold."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """{key: value}."""


@dataclass(frozen=True)
class Key:
    """One axis, one key. `default`: what an absent key or a null means. `values`: their value of each of ours. `also`:
    another key that published files use."""

    ours: str
    theirs: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    also: str = ""

    def read(self, theirs: Keys) -> dict[str, Any]:
        value = theirs.get(self.theirs, theirs.get(self.also))
        if value is None and self.default is REQUIRED:
            raise UsageError(f"config.json does not say {self.theirs}")
        if value is None:
            return {self.ours: self.default}
        if self.default is REQUIRED and type(value) is not int:
            raise UsageError(f"config.json: {self.theirs}={value!r}: sizes are whole numbers")
        if self.values is None:
            self._check_kind(value)
            return {self.ours: value}
        found = [ours for ours, their in self.values.items() if their == value]
        if not found:
            known = ", ".join(map(str, self.values.values()))
            raise UsageError(f"config.json asks for {self.theirs}={value}, which is not computed here: only {known}")
        return {self.ours: found[0]}

    def _check_kind(self, value: Any) -> None:
        """A flag where the default is one, else a number."""
        is_flag = isinstance(self.default, bool)
        if isinstance(value, bool) != is_flag or not isinstance(value, (int, float)):
            what = "true or false" if is_flag else "a number"
            raise UsageError(f"config.json: {self.theirs}={value!r} is not {what}")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        value = getattr(config.explicit(), self.ours)
        if self.values is not None:
            return {self.theirs: self.values[value]} if value in self.values else {}
        return {self.theirs: value}


@dataclass(frozen=True)
class Always:
    """Axes that the family does not choose."""

    axes: Mapping[str, Any]

    def read(self, theirs: Keys) -> dict[str, Any]:
        return dict(self.axes)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Only:
    """A key that must have the one value (or be absent) whose meaning is computed here."""

    theirs: str
    value: Any

    def read(self, theirs: Keys) -> dict[str, Any]:
        found = theirs.get(self.theirs)
        if found is not None and found != self.value:
            raise UsageError(f"config.json asks for {self.theirs}={found}, which is not computed here")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.value}


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before it.

    `fraction` and `theta`: what an absent key means.
    """

    theta: float = 10000.0
    fraction: float = 1.0

    def read(self, theirs: Keys) -> dict[str, Any]:
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        fraction = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor"))
        return {
            "rope_theta": float(rope.get("rope_theta") or theirs.get("rope_theta") or self.theta),
            "rope_fraction": self.fraction if fraction is None else fraction,
            "rope_scaling": _scaling(rope, theirs),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaled, theta = _written(config.rope_scaling), config.rope_theta
        rope = {"rope_type": config.rope_scaling.kind.value, "rope_theta": theta, **scaled}
        if config.rope_scaling.kind is Scaling.NONE:
            rope["rope_type"] = "default"
        plain = config.rope_fraction == self.fraction == 1
        partial = {} if plain else {"partial_rotary_factor": config.rope_fraction}
        older = {"rope_scaling": {"rope_type": rope["rope_type"], **scaled}} if scaled else {}
        return {"rope_theta": theta, **older, **partial, "rope_parameters": {**rope, **partial}}


_SCALING_KEYS = {  # kind -> {their key: our field}
    Scaling.LINEAR: {"factor": "factor"},
    Scaling.DYNAMIC: {"factor": "factor"},  # the original context is max_position_embeddings
    Scaling.LLAMA3: {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "low_freq_factor": "slow",
        "high_freq_factor": "fast",
    },
    Scaling.YARN: {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "beta_slow": "slow",
        "beta_fast": "fast",
        "attention_factor": "sharpness",
    },
}
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _scaling(rope: Keys, theirs: Keys) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    known = {scaling.value: scaling for scaling in _SCALING_KEYS}
    if kind not in known:
        raise UsageError(
            f"config.json asks for rope scaling '{kind}', which is not computed here: only {', '.join(known)}"
        )
    keys = _SCALING_KEYS[known[kind]]
    strange = [key for key in rope if key not in (*keys, *_ROPE_KEYS) and rope[key] is not None]
    if strange:
        raise UsageError(
            f"config.json: rope scaling '{kind}' with {strange[0]}={rope[strange[0]]} is not computed here"
        )
    if rope.get("factor") is None:
        raise UsageError(f"config.json: rope scaling '{kind}' does not say its factor")
    given = {ours: rope[key] for key, ours in keys.items() if rope.get(key) is not None}
    if "original_positions" in keys.values():
        given.setdefault(
            "original_positions", theirs.get("original_max_position_embeddings", theirs.get("max_position_embeddings"))
        )
    if known[kind] is Scaling.DYNAMIC:
        given["original_positions"] = theirs.get("max_position_embeddings") or 0
    return RopeScaling(kind=known[kind], **{name: _as_field(name, value) for name, value in given.items()})


def _as_field(name: str, value: Any) -> Any:
    return int(value) if name == "original_positions" else float(value)


def _written(scaling: RopeScaling) -> dict[str, Any]:
    keys = _SCALING_KEYS.get(scaling.kind, {})
    values = {key: getattr(scaling, ours) for key, ours in keys.items()}
    if "fast" in keys.values():
        values[next(key for key, ours in keys.items() if ours == "fast")] = scaling.upper
    if not scaling.sharpness:
        values.pop("attention_factor", None)
    return values


@dataclass(frozen=True)
class Window:
    """Sliding attention. Mistral: `sliding_window` in every layer; Qwen: from `max_window_layers` on, if it is used."""

    used_key: str = ""  # "use_sliding_window"
    default: int | None = 4096

    def read(self, theirs: Keys) -> dict[str, Any]:
        if self.used_key and not theirs.get(self.used_key, False):
            return {"window": 0, "window_from": 0}
        window = theirs.get("sliding_window", self.default) or 0
        since = theirs.get("max_window_layers", 28) if self.used_key and window else 0
        self._check_layers(theirs, window, since)
        return {"window": window, "window_from": since}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        window = {"sliding_window": config.window or None}
        if not self.used_key:
            return window
        since = config.window_from if config.window else config.num_layers
        return {self.used_key: config.window > 0, "max_window_layers": since, **window}

    @staticmethod
    def _check_layers(theirs: Keys, window: int, since: int) -> None:
        kinds: Sequence[str] = theirs.get("layer_types") or ()
        ours = ["sliding_attention" if window and layer >= since else "full_attention" for layer in range(len(kinds))]
        if list(kinds) != ours:
            raise UsageError(
                f"config.json: layer_types={list(kinds)} is not computed here: a window begins at one layer and "
                "goes on to the last"
            )


_NORMALISE = Key("normalise", "norm_topk_prob", False)


@dataclass(frozen=True)
class Experts:
    """A mixture of Qwen's: `num_experts` of `moe_intermediate_size`, in every layer that `decoder_sparse_step` divides,
    counted from 1, but for the first ones, `mlp_only_layers`. The rest: what an absent key means; `shared` 0: no such
    key. The load-balance loss is asked for by `output_router_logits`, and its coefficient carried as it is, though
    transformers' formula is k times ours, of all layers and rows together (`models.moe`)."""

    size: int
    experts: int
    top_k: int
    shared: int = 0

    def read(self, theirs: Keys) -> dict[str, Any]:
        count = self._of(theirs, "num_experts", self._of(theirs, "num_local_experts", self.experts))
        if not count:
            return {"moe": MoeConfig()}
        asked = theirs.get("output_router_logits", False)
        return {
            "moe": MoeConfig(
                experts=count,
                top_k=self._of(theirs, "num_experts_per_tok", self.top_k),
                intermediate_size=self._of(theirs, "moe_intermediate_size", self.size),
                shared=self._of(theirs, "shared_expert_intermediate_size", self.shared) if self.shared else 0,
                shared_gate=self.shared > 0,
                **_NORMALISE.read(theirs),
                first=self._first(theirs),
                every=self._of(theirs, "decoder_sparse_step", 1),
                balance=float(theirs.get("router_aux_loss_coef", 0.001)) if asked else 0.0,
            )
        }

    @staticmethod
    def _of(theirs: Keys, key: str, default: int) -> int:
        value = theirs.get(key)
        value = default if value is None else value
        if type(value) is not int:
            raise UsageError(f"config.json: {key}={value!r}: sizes are whole numbers")
        return value

    @staticmethod
    def _first(theirs: Keys) -> int:
        plain = sorted(theirs.get("mlp_only_layers") or ())
        if plain != list(range(len(plain))):
            raise UsageError(f"config.json: mlp_only_layers={plain} is not computed here: only the first ones")
        return len(plain)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        moe = config.explicit().moe
        balance = {"router_aux_loss_coef": moe.balance} if moe.balance else {}
        shared = {"shared_expert_intermediate_size": moe.shared} if self.shared else {}
        return {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.intermediate_size,
            **shared,
            "norm_topk_prob": moe.normalise,
            "decoder_sparse_step": moe.every,
            "mlp_only_layers": list(range(moe.first)),
            "output_router_logits": moe.balance > 0,
            **balance,
        }


SILU = Only("hidden_act", "silu")
GELU_NAMES = {Activation.GELU: "gelu", Activation.GELU_TANH: "gelu_new", Activation.RELU: "relu"}


def read_all(settings: Sequence[Setting], theirs: Keys, family: str) -> ModelConfig:
    """config.json -> ModelConfig."""
    axes: dict[str, Any] = {}
    for setting in settings:
        axes |= setting.read(theirs)
    if theirs.get("quantization_config"):
        raise UsageError("config.json asks for quantization_config, which is not computed here")
    return ModelConfig(family=family, **axes)


def write_all(settings: Sequence[Setting], config: ModelConfig, layout: str) -> dict[str, Any]:
    """ModelConfig -> their keys; UsageError where they cannot say what it is."""
    theirs: dict[str, Any] = {}
    for setting in settings:
        theirs |= setting.write(config)
    back, whole = read_all(settings, theirs, config.family).explicit(), config.explicit()
    for axis in dataclasses.fields(ModelConfig):
        said, meant = (_value(getattr(model, axis.name)) for model in (back, whole))
        if said != meant:
            raise UsageError(
                f"the {layout} layout cannot hold model.{axis.name}={meant}; it would be read as {said}. "
                "model.family=framework holds every axis"
            )
    return theirs


def _value(value: Any) -> Any:
    """Numbers are compared as numbers; what a scaling leaves open, by what it stands for."""
    if isinstance(value, RopeScaling):
        return (value.kind.value, value.factor, value.original_positions, value.slow, value.upper, value.sharpness)
    return value.value if isinstance(value, Enum) else value
