"""Files that are complete or absent."""

from errors import UserError

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it; a device or a pipe, such as /dev/stdout, is written to directly.

    Raises UserError, and leaves nothing behind, if the disk is full or fails.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            target.write_bytes(content)
            return
        try:
            with open(partial, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})", 4) from None
