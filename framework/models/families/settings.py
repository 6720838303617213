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
from framework.models.config import Activation, ModelConfig, RopeScaling, Scaling

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
