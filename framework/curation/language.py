"""Which language a text is in, by the `py3langid` package (Lui and Baldwin 2012), which needs no network."""

import functools
from collections.abc import Callable

from framework.core.errors import UsageError

# Written alike, and told apart by chance in short texts: one language here.
_WRITTEN_AS = {"wuu": "zh", "yue": "zh", "lzh": "zh", "gan": "zh", "hak": "zh", "nan": "zh"}
_LONGEST = 4096  # characters looked at


def language(text: str) -> str:
    """The ISO 639 code: "zh", "en", ...; "und" for a text without letters. UsageError where the package is missing."""
    if not any(character.isalpha() for character in text[:_LONGEST]):
        return "und"
    code = _classify()(text[:_LONGEST])[0]
    return _WRITTEN_AS.get(code, code)


@functools.cache
def _classify() -> Callable[[str], tuple[str, float]]:
    try:
        import py3langid
    except ImportError:
        raise UsageError('telling languages needs a package: pip install "framework[curation]"') from None
    classify: Callable[[str], tuple[str, float]] = py3langid.classify
    return classify
