"""Benchmarks beside other libraries: those that are here take part and compute the same; those that are not are left
out. transformers is the real one, the others are stand-ins with real signatures."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ext.attention import op as attention
from cuda_ext.measure import Case, rival
from tests.cuda_ext.standing_in import standing_in
from tests.cuda_ext.test_flash import varlen

INSTALLED = ("flash_2", "flash_3", "apex", "liger")
SIZES: dict[str, list[Any]] = {
    "attention": [(2, 136, 2, 1, 8)],
    "rms_norm": [(3, 16)],
    "layer_norm": [(3, 16)],
    "swiglu": [(3, 16)],
    "rotary": [(2, 3, 2, 16)],
    "linear_log_probs": [(6, 16, 24)],
    "adamw": [[30, 20]],
}
BESIDE = {
    "attention": {"SDPA", "SDPA, mask", "varlen_attn", "flash-attn 2", "flash-attn 3"},
    "rms_norm": {"eager", "compile", "liger", "apex", "transformers"},
    "layer_norm": {"eager", "compile", "liger", "apex"},
    "swiglu": {"eager", "compile", "liger"},
    "rotary": {"eager", "compile", "liger", "transformers"},
    "linear_log_probs": {"eager", "compile", "liger"},
    "adamw": {"eager", "fused", "apex"},
}


def cases(op: str) -> list[Case]:
    torch.manual_seed(0)
    return list(importlib.import_module(f"cuda_ext.{op}.benchmark").cases("cpu", sizes=SIZES[op]))


def tensors(outcome: Any) -> list[Tensor]:
    return [outcome] if isinstance(outcome, Tensor) else [x for x in outcome or () if isinstance(x, Tensor)]


@pytest.mark.parametrize("op", SIZES)
def test_all_that_are_here_take_part_and_agree(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # half a minute of C++
    monkeypatch.setattr(attention, "varlen_attn", varlen)  # torch's own has no form for a CPU
    with standing_in(*INSTALLED):
        found = cases(op)
        assert {name for case in found for name in case.rivals} == BESIDE[op]
        for case in found:
            ours = tensors(case.ours())
            for name, call in case.rivals.items():
                theirs = tensors(call())
                if op == "rotary" and name in ("liger", "transformers"):
                    theirs = [theirs[0].transpose(1, 2)]  # and keys
                if op == "adamw" or (op == "rotary" and "backward" in case.name):
                    continue  # an update changes what the next one finds
                for a, b in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(a.float(), b.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("op", SIZES)
def test_what_is_not_here_is_left_out(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    absent = {"liger", "apex", "flash-attn 2", "flash-attn 3", "flash-attn 4", "varlen_attn"}
    with standing_in(card=None):
        names = {name for case in cases(op) for name in case.rivals}
    assert names == BESIDE[op] - absent


def test_a_rival_is_what_is_made_of_its_module_or_nothing() -> None:
    assert rival("root", "math", lambda module: module.sqrt)["root"](4) == 2
    assert rival("root", "no_such_module", lambda module: module.sqrt) == {}
    assert rival("root", "math", lambda module: module.no_such_function) == {}
