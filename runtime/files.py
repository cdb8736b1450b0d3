"""Files that are complete or absent."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write bytes. It gets its name at the end of the block, and nothing is left if the block fails.

    A device or a pipe, such as /dev/stdout, is written directly.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if os.path.exists(target) and not os.path.isfile(target):
        with open(target, "wb") as f:
            yield f
        return
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(target)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None  # and not the partial file's name
    finally:
        partial.unlink(missing_ok=True)
