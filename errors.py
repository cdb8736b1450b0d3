"""How every script ends: an error becomes one line for its user, and an exit status."""

import errno
import os
import sys
from collections.abc import Callable

# Errors of the system that come from a wrong name or permission. All others are of the disk or the network.
USAGE_ERRORS = "ENOENT ENOTDIR EISDIR EEXIST EACCES EPERM EROFS ENAMETOOLONG ELOOP".split()


class UserError(Exception):
    """An error that a user can mend; its message names the file or flag, what was found and what to do."""

    def __init__(self, message: str, status: int = 2, agreed: bool = False):
        super().__init__(message)
        self.status = status  # 2 for usage or data, 3 for a loss that is not finite, 4 for disk or network
        self.agreed = agreed  # whether every rank of a run raises it

    @classmethod
    def from_error(cls, e: Exception) -> "UserError":
        """Return a UserError as it is, and an OSError as one with its status."""
        if isinstance(e, cls):
            return e
        message = f"{e.filename}: {e.strerror}" if e.filename and e.strerror else first_line(e)
        return cls(message, 2 if errno.errorcode.get(e.errno) in USAGE_ERRORS else 4)


def first_line(e: Exception) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Call main(argv) and return the exit status; print errors a user can cause as one line on stderr."""
    script = os.path.basename(sys.modules[main.__module__].__file__)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # print what the terminal's encoding lacks as a question mark
            stream.reconfigure(errors="replace")
    try:
        status = main(argv)
    except UserError as e:
        status = print_error(script, e, e.status)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        status = 0
    except OSError as e:
        error = UserError.from_error(e)
        message = error if e.filename else f"standard output: {e.strerror or error}"
        status = print_error(script, message, error.status)
    except KeyboardInterrupt:
        status = print_error(script, "interrupted", 130)
    try:
        sys.stdout.flush()
    except OSError as e:
        silence(1)  # or Python would report the same error again at its exit
        if status == 0 and not isinstance(e, BrokenPipeError):
            status = print_error(script, f"standard output: {e.strerror}", 4)
    return status


def print_error(script: str, message: object, status: int) -> int:
    """Print the line, unless nobody reads stderr any more; return the status."""
    try:
        print(f"{script}: error:", *str(message).splitlines(), file=sys.stderr, flush=True)
    except OSError:
        silence(2)
    return status


def silence(fd: int) -> None:
    """Discard what is written to this file descriptor from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def exit_if_interrupted(kind: type[BaseException], value: BaseException, traceback) -> None:
    """End without a traceback at a Ctrl-C outside of run_script: while a script imports torch."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, value, traceback)


# Every script imports this module before any other, so this is in force while it imports the rest.
sys.excepthook = exit_if_interrupted
while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # for standard streams that are closed: no file gets their number
    pass
os.close(fd)
sys.stdin = sys.stdin or open(0, closefd=False)
sys.stdout = sys.stdout or open(1, "w", closefd=False)
sys.stderr = sys.stderr or open(2, "w", closefd=False)
