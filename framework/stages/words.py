"""The ordinary arguments of tools: argparse, whose complaints leave as one line with exit code 2."""

import argparse
from typing import NoReturn

from framework.core.errors import UsageError


class Words(argparse.ArgumentParser):
    """`--help` prints and leaves with 0."""

    def error(self, message: str) -> NoReturn:
        """Refuse, as every wrong word is refused."""
        raise UsageError(message)
