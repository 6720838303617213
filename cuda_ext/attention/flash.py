"""flash-attn: which of its versions is installed, and which of those takes a call on this card.

=  ====================================  ====================  =======================================================
2  `flash_attn` (Dao 2024)               8.0 and newer         heads of 8 to 256 numbers
3  `flash_attn_interface` (Shah 2024)    9.0                   the same; deterministic backward up to 192
4  `flash_attn.cute.interface`           9.0 to 10.3           the same; on 10.x 8 to 128, and 256 without a soft cap
=  ====================================  ====================  =======================================================

all in bf16 and fp16, read off flash-attn 2.8.3, hopper/ at 01afd16d and flash-attn-4 4.0.0b36. None has been
run from here yet. Importing this needs no torch. Left out: the calls (`op`).
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuda_ext.implementation import Implementation

if TYPE_CHECKING:
    import torch

Card = tuple[int, int]  # compute capability
DTYPES = ("bfloat16", "float16")
ABSENT = "flash-attn is not installed here"
_FUNCTIONS = {
    "flash_attn_func": (),
    "flash_attn_varlen_func": ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
}
_WORDS = ("softmax_scale", "causal", "window_size", "softcap", "deterministic")


@dataclass(frozen=True)
class Version:
    """One of flash-attn's. `unbounded`: how its window says that there is none. `opaque`: torch.compile is kept out."""

    number: int
    module: str
    first: Card
    last: Card
    runs: Implementation
    unbounded: int | None = -1
    opaque: bool = True

    def __str__(self) -> str:
        return f"flash-attn {self.number}"


def _version(number: int, module: str, first: Card, last: Card, **ways: Any) -> Version:
    return Version(
        number, module, first, last, Implementation(f"flash-attn {number}", "it is here, and fits", True), **ways
    )


VERSIONS = (  # the first that can runs
    _version(3, "flash_attn_interface", (9, 0), (9, 0)),
    _version(4, "flash_attn.cute.interface", (9, 0), (10, 3), unbounded=None),
    _version(2, "flash_attn", (8, 0), (99, 0), opaque=False),
)
LOADED: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # number -> functions for whole and packed rows


def card(device: "torch.device") -> Card | None:
    """The compute capability of `device`; None where it is no NVIDIA GPU."""
    return _capability(device.index) if device.type == "cuda" else None


def pick(card: Card, dtype: object, size: int, capped: bool, exact: bool) -> Version | str:
    """What takes heads of `size` numbers of `dtype`, `capped` or not, with a deterministic backward where `exact`, and
    is in LOADED then; else why none does."""
    return _pick(card, str(dtype).removeprefix("torch."), size, capped, exact)


def is_half(dtype: object) -> bool:
    """Whether fused attention takes it: bf16 or fp16."""
    return str(dtype).removeprefix("torch.") in DTYPES


def every(card: Card, dtype: object, size: int) -> list[Version]:
    """All that could take such a call, in LOADED then."""
    name = str(dtype).removeprefix("torch.")
    there = [version for version in VERSIONS if _is_there(version)]
    return [v for v in there if not (_unfit(v, card, name, size, False, False) or load_error(v))]


def why_not(card: Card) -> str:
    """Why no version runs on such a card at all; "" where one does."""
    found = pick(card, DTYPES[0], 64, False, False)
    return found if isinstance(found, str) else ""


def explain() -> str:
    """What is installed, or that nothing is; each with what stands against it."""
    there = [version for version in VERSIONS if _is_there(version)]
    return "; ".join(f"{version} {load_error(version) or 'is installed'}" for version in there) or ABSENT


@functools.cache
def load_error(version: Version) -> str:
    """Why it cannot be loaded; "" where it is."""
    try:
        LOADED[version.number] = _load(version.module)
    except Exception as error:  # whatever a library built for another torch says when it is opened
        return f"cannot be used: {(str(error) or type(error).__name__).splitlines()[0]}"
    return ""


def forget() -> None:
    """Look again at what is installed."""
    LOADED.clear()
    load_error.cache_clear()
    _pick.cache_clear()


def _load(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """ImportError where the functions are not there, or take other words."""
    module = importlib.import_module(name)
    for function, words in _FUNCTIONS.items():
        there = inspect.signature(getattr(module, function, lambda: None)).parameters
        missing = sorted({*words, *_WORDS} - there.keys())
        if missing:
            raise ImportError(f"its {function} does not take {', '.join(missing)} (install a newer one)")
    return module.flash_attn_func, module.flash_attn_varlen_func


@functools.cache
def _pick(card: Card, dtype: str, size: int, capped: bool, exact: bool) -> Version | str:
    reasons = []
    for version in VERSIONS:
        if not _is_there(version):
            continue
        reason = _unfit(version, card, dtype, size, capped, exact) or load_error(version)
        if not reason:
            return version
        reasons.append(f"{version} {reason}")
    return "; ".join(reasons) or ABSENT


def _unfit(version: Version, card: Card, dtype: str, size: int, capped: bool, exact: bool) -> str:
    largest = 192 if version.number == 3 and exact else 256
    if not version.first <= card <= version.last:
        runs = (
            "from {}.{} on" if version.last[0] == 99 else "{}.{}" if version.first == version.last else "{}.{} to {}.{}"
        )
        return (
            f"is for compute capability {runs.format(*version.first, *version.last)}, this card has {card[0]}.{card[1]}"
        )
    if not is_half(dtype):
        return f"takes {' and '.join(DTYPES)}, not {dtype}"
    if size % 8 or not 8 <= size <= largest:
        return f"takes heads of 8, 16, .. {largest} numbers{' to be deterministic' * (largest < 256)}, not {size}"
    if version.number == 4 and card[0] == 10 and size > 128 and (size < 256 or capped):
        return f"takes heads of up to 128 numbers on this card, or 256 without a soft cap, not {size}"
    return ""


def _is_there(version: Version) -> bool:
    package, *path = version.module.split(".")
    found = find_spec(package)
    if found is None or not path:
        return found is not None and found.origin is not None  # without: a folder, of which version 4 has a part
    return any(Path(place, path[0]).is_dir() for place in found.submodule_search_locations or ())


def _capability(index: int | None) -> Card | None:
    import torch

    if torch.version.cuda is None:
        return None
    found: Card = torch.get_device_module("cuda").get_device_capability(index)
    return found


for _asked in (_capability, pick):  # as assume_constant_result, before torch is here
    _asked.__dict__["_dynamo_marked_constant"] = True
