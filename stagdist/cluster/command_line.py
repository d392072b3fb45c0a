"""Command lines that every rank parses: what is wrong with one is told once."""

import argparse
from typing import NoReturn

from stagdist.errors import ConfigError


class RanksParser(argparse.ArgumentParser):
    """Raises where argparse would print usage and exit: all ranks get the same command line, and one of them speaks."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always, the same on every rank.
        """
        problem = ConfigError(f"{message} (see --help)")
        problem.everywhere = True
        raise problem
