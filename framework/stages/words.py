"""The words of a tool as argparse reads them, with our kind of error."""

import argparse
from typing import NoReturn

from framework.core.errors import UsageError


class Words(argparse.ArgumentParser):
    """A wrong word is a UsageError: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
