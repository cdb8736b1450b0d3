"""Files that are complete or absent."""

from errors import UserError, first_line
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write bytes. It gets its name at the end of the block; nothing is left if the block fails.

    A device or a pipe, such as /dev/stdout, is written directly. Raise UserError if the disk is full or fails.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    is_device = os.path.exists(target) and not os.path.isfile(target)
    partial = target if is_device else target.with_name(target.name + ".partial")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            if not is_device:
                os.fsync(f.fileno())
                partial.replace(target)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or first_line(e)})", 4) from None
    finally:
        if not is_device:
            partial.unlink(missing_ok=True)
