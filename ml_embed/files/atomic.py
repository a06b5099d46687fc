"""Writing files so that a reader sees either all of it or nothing.

Everything is written under a hidden name beside its place, forced to disk, and renamed.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError, disk_error
from ml_embed.files.digests import file_digest
from ml_embed.files.json_file import parse_json

CHECKSUMS_FILE = "checksums.json"
CHECKSUM = "xxh3_128"
MAX_SHARD_SIZE = "5GB"
"""Of a file of weights; larger models are split. The hub's own tools split there, too."""
FULL = (errno.ENOSPC, errno.EDQUOT)
LONGEST_NAME = 255
"""Bytes of a file's name that Linux, macOS and Windows allow."""
_PARTIAL = ".partial"
_REPLACED = ".replaced"


def partial_path(path: Path) -> Path:
    """Where a file or folder is written before it is whole: `.NAME.partial` beside it."""
    return _beside(path, _PARTIAL)


def _beside(path: Path, suffix: str) -> Path:
    """`.NAMEsuffix` beside a path; a long NAME is cut, with a digest of it in its place."""
    name = os.fsencode(path.name)
    if len(name) + 1 + len(suffix) > LONGEST_NAME:
        name = name[:100] + hashlib.sha256(name).hexdigest()[:32].encode()
    return path.with_name(f".{os.fsdecode(name)}{suffix}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write a file to; when the block ends well, that file becomes `path` in one step.

    When the block fails, what it wrote is removed and `path` is as it was.

    Raises:
        UserError: another process or thread is writing `path`.
    """
    partial = partial_path(path)
    with _sole_writer(partial, path):
        try:
            yield partial
            _sync_file(partial)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):  # of a disk that fails; the next write tries again
                partial.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextmanager
def _sole_writer(partial: Path, path: Path) -> Iterator[None]:
    """Hold the lock of a file that is being written; what a killed writer left has none."""
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path} is being written by another process or thread; wait for it, or give "
                "another path"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def disk_errors_are_user_errors(folder: Path, remedy: str) -> Iterator[None]:
    """A disk error while writing below `folder` becomes a UserError that ends in `remedy`."""
    try:
        yield
    except Exception as error:
        problem = disk_error(error) or (error if isinstance(error, OSError) else None)
        if isinstance(error, UserError) or problem is None:
            raise
        if problem.errno in FULL:
            raise UserError(f"no space left while writing to {folder}. {remedy}") from error
        raise UserError(f"cannot write to {folder}: {problem}. {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_file(path) if path.is_file() else sync_folder(path)
    sync_folder(folder)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well, it becomes `target` or takes its place.

    Where `target` is a link, what it points to is made or replaced. After a kill between the two
    renames the old folder is put back by the next write, or by `restore_replaced`.

    Raises:
        UserError: the disk is full or fails. Nothing of the new folder is left, and an old `target`
            is as it was.
    """
    target = target.resolve()
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_replaced(target)
        partial.mkdir()
        yield partial
        _sync_files(partial)
        if target.exists():
            target.rename(_aside(target))
        partial.rename(target)
        sync_folder(target.parent)
        restore_replaced(target)
    except BaseException as error:
        with suppress(OSError):  # of a disk that fails; the next write tries again
            restore_replaced(target)
        shutil.rmtree(partial, ignore_errors=True)
        problem = disk_error(error) or (error if isinstance(error, OSError) else None)
        if problem is None:
            raise
        if problem.errno in FULL:
            raise UserError(
                f"no space left on the disk of {target.parent}; free some, then continue the run"
            ) from error
        raise UserError(
            f"{target} cannot be written ({problem}); see to that, then continue the run"
        ) from error


def _aside(target: Path) -> Path:
    """Where a folder waits while another takes its place."""
    return _beside(target, _REPLACED)


def restore_replaced(target: Path) -> None:
    """Put back the folder that an interrupted `atomic_folder` was about to replace.

    Where the new folder is in place already, the old one is removed.

    Args:
        target: not a link.
    """
    old = _aside(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name."""
    aside = partial_path(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n"
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_whole(path: Path, text: str) -> None:
    """Append to a file; where that fails (a full disk), the file is left as it was."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        data = memoryview(text.encode())
        try:
            while data:  # a nearly full disk takes a part, and fails at the next write
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(before)
            # A failed write does not say where.
            raise OSError(error.errno, error.strerror, str(path)) from None


def remove_leftovers(folder: Path) -> None:
    """Remove from `folder` what interrupted writes left, and put back a folder being replaced."""
    for path in folder.glob(f".*{_REPLACED}"):
        restore_replaced(folder / path.name.removeprefix(".").removesuffix(_REPLACED))
    for path in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_checksums(folder: Path) -> None:
    """Record the digest of every file of a folder in the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sums = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    text = json.dumps({CHECKSUM: sums}, indent=2)
    (folder / CHECKSUMS_FILE).write_text(text, encoding="utf-8")


def checksum_problem(folder: Path) -> str | None:
    """What is wrong with a folder by the sums of `write_checksums`, "is …"; None if nothing is."""
    try:
        sums = parse_json((folder / CHECKSUMS_FILE).read_bytes())
        if CHECKSUM not in sums:
            return "was saved by another version of ml-embed, which has to go on with it"
        for name, expected in sums[CHECKSUM].items():
            if file_digest(folder / name) != expected:
                return f"is damaged ({name} does not match its checksum)"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"is damaged ({CHECKSUMS_FILE} or a file it names cannot be read: {error})"
    return None


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def give_usual_permissions(folder: Path) -> None:
    """Let others read the weights: safetensors makes files that only their owner can read."""
    mode = 0o666 & ~umask()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)
