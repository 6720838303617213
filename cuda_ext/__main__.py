"""`python -m cuda_ext`: builds kernels, shows their proof cards, measures them, says which run here.

::

    build [cuda|emulator|address]    the library of all kernels
    card OP                          registers, spills and machine code of OP on every architecture
    benchmark [OP ...]               ops (all) beside their rivals, on this machine's card; tables go to runs/cards
    explain                          which implementation of each op runs here, and why
    new OP                           a folder and a test for a new op, which pass: swiglu's under another name
"""

import re
import sys
from pathlib import Path

from cuda_ext import build, dispatch, proof

_TESTS = build.ROOT.parent / "tests/cuda_ext"
_MODEL = "swiglu"  # the smallest op


def main(words: list[str]) -> str | int:
    """An exit status, or the line that says what was wrong."""
    match words:
        case ["build", *kinds] if all(kind in build.KINDS for kind in kinds):
            for kind in kinds or ["cuda"]:
                print(build.build(build.KINDS[kind]))
        case ["card", op] if op in build.kernels():
            card = proof.read(op)
            print(f"{op}\n{card}")
            return int(bool(card.faults))
        case ["benchmark", *ops] if all((build.ROOT / op / "benchmark.py").exists() for op in ops):
            return _benchmark(ops or sorted(path.parent.name for path in build.ROOT.glob("*/benchmark.py")))
        case ["explain"]:
            print(dispatch.explain())
        case ["new", op]:
            return _new(op, build.ROOT, _TESTS)
        case ["card" | "benchmark", *_, op]:
            return f"cuda_ext: '{op}' is not an op with a kernel: choose one of {', '.join(build.kernels())}"
        case _:
            return (__doc__ or "").strip()
    return 0


def _benchmark(ops: list[str]) -> str | int:
    reason = dispatch.library.why_not(0)
    if reason:
        return f"cuda_ext: nothing can be measured here: {reason}"
    import torch

    from cuda_ext import roofline

    card = torch.get_device_module("cuda").get_device_name(0)
    print(roofline.run(ops, "cuda", card, Path("runs/cards"), roofline.ceilings("cuda")))
    return 0


def _new(op: str, packages: Path, tests: Path) -> str | int:
    """Copy the smallest op, with its name replaced."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", op) or (packages / op).exists():
        return f"cuda_ext: '{op}' cannot be the name of a new op: small letters, digits and _, and not there yet"
    files = [path for path in (packages / _MODEL).iterdir() if path.is_file()]
    named = {path: packages / op / path.name for path in files}
    named |= {path: tests / path.name.replace(_MODEL, op) for path in tests.glob(f"test_{_MODEL}*.py")}
    for path, target in named.items():
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text().replace(_MODEL, op))
        print(target)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except build.BuildError as error:
        sys.exit(f"cuda_ext: {error}")
