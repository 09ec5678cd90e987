"""The door of every command: how it ends, whatever happened inside.

Exit codes: 0 done; 1 a failed run or check; 2 misuse or an unreadable input; 128 + the signal's
number after SIGINT, SIGTERM or SIGHUP.
"""

import functools
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

from lm_jax import console, signals

Main = Callable[..., None]  # takes the arguments, those of the process if there are none
_FAILED = (RuntimeError, ArithmeticError, MemoryError, ChildProcessError)
_PACKAGE = pathlib.Path(__file__).parent


def command(main: Main) -> Main:
    """Wrap a command's `main`: an error of its user is one sentence, `--debug` gives the traceback.

    An exception of the program itself keeps its traceback.
    """

    @functools.wraps(main)
    def ends(argv: Sequence[str] | None = None) -> None:
        arguments = list(sys.argv if argv is None else argv)
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by whoever started the command
                setattr(sys, name, open(os.devnull, "w"))
        debug = "--debug" in arguments
        arguments = [argument for argument in arguments if argument != "--debug"]
        try:
            with signals.handled(), signals.heard():
                main(arguments)
        except signals.Interrupted as stopped:
            console.complain(str(stopped))
            if stopped.again:  # XLA, which computes still, would abort the end
                os._exit(128 + stopped.number)
            sys.exit(128 + stopped.number)
        except BrokenPipeError:
            sys.stderr.close()  # else Python complains at exit that it cannot flush
            sys.exit(128 + 13)
        except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
            if debug:
                raise
            console.complain(_sentence(error, main))
            sys.exit(1 if isinstance(error, _FAILED) else 2)
        finally:
            console.use()

    return ends


def _sentence(error: Exception, main: Main) -> str:
    """What to tell a user: what was raised on purpose as it is, the rest with its kind."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}."
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return (
            "The memory of the device is used up: lower config.data.micro_batch, or set "
            "config.model.remat=True; --debug shows where."
        )
    raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if raised_in.is_relative_to(_PACKAGE) or str(raised_in) == inspect.getsourcefile(main):
        return text
    first = text.partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}; --debug shows where."
