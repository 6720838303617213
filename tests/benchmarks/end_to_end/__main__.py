"""`python -m tests.benchmarks.end_to_end [training] [decoding] [ppo]`, all without a word; --tiny where no card is.

Lines go to the card's table of today (runs/cards), beside those of the kernels. Where a package of the project is
missing, one line says which, and nothing has failed.
"""

import argparse
import sys
from pathlib import Path

PARTS = ("training", "decoding", "ppo")
_OURS = ("framework", "cuda_ext", "tests")


def main(argv: list[str] | None = None) -> int:
    """An exit status."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default all")
    words.add_argument("--tiny", action="store_true", help="sizes for a test, on the CPU")
    words.add_argument("--folder", type=Path, default=Path("runs/cards"), help="of the tables; default runs/cards")
    args = words.parse_args(argv)
    if unknown := [part for part in args.parts if part not in PARTS]:
        words.error(f"'{unknown[0]}' is no part: choose of {', '.join(PARTS)}")
    try:
        from tests.benchmarks.end_to_end.parts import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        print(f"end to end: skipped, {error.name} is missing")
        return 0
    print(run(args.parts or PARTS, args.tiny, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
