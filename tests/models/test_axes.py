"""The axes in words: every key of the stages, none without a meaning, and each text really a comment of config.py."""

from enum import Enum

from framework.models.axes import axes
from framework.models.config import Activation, ModelConfig, NormPlace
from framework.stages.refusal import defaults_of

AXES = {axis.key: axis for axis in axes()}


def test_the_axes_are_the_keys_below_model_with_their_defaults() -> None:
    defaults = {key: value for key, value in defaults_of("pretrain").items() if key.startswith("model.")}
    assert list(AXES) == list(defaults)
    for key, value in defaults.items():
        written = str(value).lower() if isinstance(value, bool) else str(value)
        assert AXES[key].default == written, key
        kind = type(value)
        choices = [str(choice) for choice in kind] if issubclass(kind, Enum) else []
        assert [name for name, _ in AXES[key].choices] == choices, key


def test_no_axis_and_no_choice_goes_without_a_meaning() -> None:
    silent = [key for key, axis in AXES.items() if len(axis.meaning) < 10]
    silent += [f"{key}={value}" for key, axis in AXES.items() for value, meaning in axis.choices if not meaning]
    assert silent == []


def test_a_meaning_is_what_stands_behind_the_field() -> None:
    assert AXES["model.rope_fraction"].meaning == "the first part of each head that turns (GLM: a half)"
    assert AXES["model.rope_scaling.fast"].meaning == "turns; 0 = 4 (llama3), 32 (yarn)"
    assert dict(AXES["model.norm_place"].choices)[str(NormPlace.POST)] == "norm(x + f(x)) (Vaswani et al. 2017)"
    assert AXES["model.activation"].meaning == " ".join((Activation.__doc__ or "").split())
    assert AXES["model.activation"].default == str(ModelConfig().activation)
