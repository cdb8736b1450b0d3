"""Files that are complete or absent."""

from errors import UserError, first_line
import contextlib
import hashlib
import json
import os
import urllib.request
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm


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


def write_json(path: Path, content: object) -> None:
    with write_atomically(path) as f:
        f.write((json.dumps(content, indent=2) + "\n").encode())


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Return the path, to which the file is downloaded if there is none, and checked. Raise UserError."""
    if path.exists():
        return path
    content = bytearray()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response:
            size = int(response.headers["Content-Length"] or 0)
            with tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                while part := response.read(2**20):
                    content += part
                    bar.update(len(part))
        if size and len(content) != size:
            raise OSError(f"found {len(content):,} bytes of {size:,}")
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise OSError(f"found {len(content):,} bytes that do not have the expected SHA-256 {sha256}")
    except (OSError, HTTPException) as e:
        message = f"no {path}, and it could not be downloaded ({first_line(e)})"
        raise UserError(f"{message}; put it there from {url}", 4) from None
    with write_atomically(path) as f:
        f.write(content)
    return path


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file to read from. Raise UserError if it is not what it should be."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError:
        raise
    except Exception as e:  # of many types, by what is damaged
        raise UserError(f"{path}: cannot be read as a zip file ({first_line(e)}); delete it") from None
