"""What command lines share: a user's mistake ends in one sentence and exit code 1."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from absl import flags

from concat_jax.configuration import check_choice


@contextlib.contextmanager
def one_sentence(*errors: type[Exception]) -> Iterator[None]:
    """Ends the program with the text of an error on one line, instead of a traceback.

    Args:
      errors: what is a user's mistake besides ValueError and OSError.
    """
    try:
        yield
    except (ValueError, OSError, *errors) as error:
        sys.exit(f"Error: {' '.join(str(error).split())}")


class Parser(argparse.ArgumentParser):
    """argparse's parser; a mistake ends in one sentence, an unknown flag with the nearest."""

    def __init__(self, **settings):
        """Takes argparse's arguments; flags cannot be abbreviated."""
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        sys.exit(f"Error: {message[0].lower()}{message[1:].rstrip('.')}.")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse's."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                self.error(f"Unknown argument {unknown[0]!r}")
            with one_sentence():
                valid = [name for name in self._option_string_actions if name != "-h"]
                check_choice(flag, valid, "there is no flag")
        return arguments


def parse_absl_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """absl's parsing of a command line; returns what is left of it.

    Raises:
      ValueError: for an unknown flag, naming the nearest.
      flags.Error: for a value that a flag does not take.
    """
    try:
        return values(argv)
    except flags.UnrecognizedFlagError as error:
        valid = [f"--{name}" for name in values]
        check_choice(f"--{error.flagname}", valid, "there is no flag")
        raise


def check_no_arguments(argv: Sequence[str], example: str) -> None:
    """Ends the program if more is left of its command line than its name.

    Args:
      argv: what is left once flags are parsed.
      example: of a flag.
    """
    if len(argv) > 1:
        sys.exit(f"Error: unknown argument {argv[1]!r}; flags look like {example}.")
