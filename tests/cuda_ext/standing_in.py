"""Libraries that cannot be installed here, played by `stand_ins`: packages with their real signatures, put where Python
finds them, on a card that is a CPU."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda_ext import apex, dispatch
from cuda_ext.attention import flash

FOLDER = Path(__file__).with_name("stand_ins")
H100 = (9, 0)
_MODULES = ("flash_attn", "flash_attn_interface", "apex", "fused_layer_norm_cuda", "amp_C", "liger_kernel")


@contextlib.contextmanager
def standing_in(*names: str, card: flash.Card | None = H100) -> Iterator[None]:
    """Within: these of `stand_ins` are installed, the CPU is such a card, and every dtype will do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.syspath_prepend(str(FOLDER / name))
        patch.setattr(flash, "card", lambda device: card)
        patch.setattr(flash, "DTYPES", ("bfloat16", "float16", "float32", "float64"))
        patch.setattr(apex, "on_gpu", lambda tensor: True)
        patch.setattr(dispatch, "_announced", set())
        _forget()
        try:
            yield
        finally:
            patch.undo()
            _forget()


def _forget() -> None:
    flash.forget()
    apex.why_not.cache_clear()
    for module in [name for name in sys.modules if name.split(".")[0] in _MODULES]:
        del sys.modules[module]
    importlib.invalidate_caches()
