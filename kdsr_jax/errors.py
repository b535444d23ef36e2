"""What a user can put right, as exceptions, and how a command line answers them."""

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from kdsr_jax.cache import keep_compiled


class UserError(Exception):
    """Bad input; command lines print it as one line and exit with code 2."""


class Told(UserError):
    """A UserError that another process of the run prints."""


class Diverged(UserError):
    """A loss, the gradient or a score became NaN or infinite; other settings may do better."""


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise UserError(f"{message}; see --help")


def answer(work: Callable[[], int | None], interrupted: str = "interrupted; the same command goes on from here") -> int:
    """Do the work of a command line, with jax's compiled programs kept for the next, and return its exit code.

    Args:
        work: returns an exit code, or None for 0.
        interrupted: line that is printed after Ctrl-C.

    Returns:
        What the work returns, 2 after one line about what the user can put right, 130 after Ctrl-C, or 1, without a word, where
        nobody reads the output to its end.
    """
    keep_compiled()
    _quiet_orbax()
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed at the end
        return 1
    except UserError as error:
        if not isinstance(error, Told):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:
        if not (said := out_of_memory(error)):
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2


def out_of_memory(error: Exception) -> str:
    """Say in one line that memory was not enough and what to do; "" where the error is another one."""
    if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
        return ""
    said = " ".join(str(error).split())[:200]
    return f"out of memory ({said}); take smaller batches, shorter histories or fewer items"


@functools.cache  # once a process
def _quiet_orbax() -> None:
    """Leave out the tracebacks that orbax and tensorstore print of a failed write besides raising it."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    told = sys.unraisablehook

    def tell(unraisable):
        # Said once a file whose writing is under way at the first failure.
        if str(unraisable.exc_value) != "Event loop is closed":
            told(unraisable)

    sys.unraisablehook = tell
