"""F2: the model as a pure function of (config, weights, tokens), its heads, initial values and folders.

`load(folder)` and `save(model, folder)` read and write the Hugging Face format; they load when first touched.
"""

from typing import Any

__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from framework.models import hub

        return getattr(hub, name)
    raise AttributeError(f"module 'framework.models' has no attribute {name!r}")
