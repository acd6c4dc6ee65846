"""Creates files and folders: never through somebody else's link, and each file whole or not at all.

Where anybody may guess a name (a socket's lock in a shared folder, a report beside unpacked rows), a link of that name
would make us write wherever it leads. So a new file is opened with `O_NOFOLLOW`, or written beside its place and
renamed, which replaces a link and leaves its target alone. In a folder that everybody may write, an existing file must
belong to this user or the folder's owner and have no second name: the rules of Linux's `fs.protected_regular` and
`fs.protected_hardlinks`, enforced here because a system may have them off.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from glob import escape
from itertools import chain
from pathlib import Path
from typing import BinaryIO

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_BINARY = getattr(os, "O_BINARY", 0)  # only on Windows
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY
_MAX_LINKS = 40
"""In a row, as in Linux."""
SECRET = 0o600
"""The mode of a file for its owner alone: keys, chats, logs."""
PRIVATE = 0o700
"""The mode of a folder for its owner alone."""
SHARED = 0o666
"""The mode of a file that the user's umask decides about."""


class Change(Enum):
    """What `update` did."""

    NEW = "new"
    NONE = "unchanged"
    REPLACED = "replaced"


class IsLink(OSError):
    """A path to be written is a symbolic link to `target`, which `strerror` names as the link has it."""

    def __init__(self, path: str, target: str) -> None:
        super().__init__(errno.ELOOP, f"is a link to {target}", path)
        self.target = os.path.join(os.path.dirname(path), target)


def open_for_writing(path: str | os.PathLike[str], flags: int, mode: int) -> int:
    """Opens the regular file at `path`, creating it with `mode` if there is none, and returns its descriptor.

    `flags` are those of `os.open` besides `O_CREAT`. Raises `IsLink`, or another `OSError` if something else is there,
    or if another user may have put it there.
    """
    descriptor = open_existing(path, flags & ~os.O_TRUNC | os.O_CREAT, mode)
    try:
        _refuse_planted(path, os.fstat(descriptor))
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_existing(path: str | os.PathLike[str], flags: int, mode: int = SHARED) -> int:
    """As `open_for_writing`, for a file that must exist because it was opened that way before."""
    # Non-blocking, since opening a FIFO waits for its other end, which may never come.
    try:
        descriptor = os.open(path, flags | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | _BINARY, mode)
    except OSError:
        refuse_link(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refusal(errno.EINVAL, "not a regular file", path)
    return descriptor


def refuse_link(path: str | os.PathLike[str]) -> None:
    """Raises `IsLink` if a path is a symbolic link."""
    try:
        target = os.readlink(path)
    except OSError:  # it is not a link
        return
    raise IsLink(os.fspath(path), target)


def refuse_irregular(path: str | os.PathLike[str]) -> os.stat_result | None:
    """The status of a regular file; None if nothing is there. Raises `IsLink`, or another `OSError`, for all else."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    refuse_link(path)
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(errno.EINVAL, "not a regular file", path)
    return status


def follow_links(path: Path) -> Path:
    """The end of the links that this user put in a file's or folder's place, to a folder of dotfiles or another disk.

    Raises `IsLink` if another user made one of the links, or owns what they lead to.
    """
    first, trusted = path, (0, _user())
    for _ in range(_MAX_LINKS):
        try:
            target = os.readlink(path)
        except OSError:  # not a link, or nothing there yet
            break
        if os.lstat(path).st_uid not in trusted:
            raise IsLink(os.fspath(path), target)
        path = path.parent / target
    else:
        raise _refusal(errno.ELOOP, os.strerror(errno.ELOOP), first)
    with suppress(FileNotFoundError):
        if path != first and os.lstat(path).st_uid not in trusted:
            refuse_link(first)
    return path


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of `data`, in as many calls as that takes; on an error none of it, as far as the disk allows."""
    size = os.fstat(descriptor).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        with suppress(OSError):
            truncate(descriptor, size)
        raise


def truncate(descriptor: int, size: int) -> None:
    """Cuts a file off after `size` bytes."""
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)


def atomic_write(path: Path, chunks: Iterable[bytes], mode: int = SHARED) -> None:
    """Replaces whatever is at `path` with a file of these chunks, durably: readers see the old or the new content.

    A file of this user's keeps its mode; a new one gets `mode`. Raises `IsLink`, or another `OSError`, also if
    something other than a regular file is there.
    """
    before = refuse_irregular(path)
    if before and is_this_users(before):
        mode, exact = stat.S_IMODE(before.st_mode) & 0o777, True
    else:
        exact = mode == SECRET
    with _beside(path) as new:
        _create(new, chunks, mode, exact)
    sync_folder(path.parent)


def update(path: Path, chunks: Iterable[bytes], replace: bool = False) -> Change:
    """As `atomic_write`, but a file that has this content already is not touched.

    Raises `FileExistsError` for a file of another content unless it may be replaced, as soon as the contents differ.
    """
    if refuse_irregular(path) is None:
        atomic_write(path, chunks)
        return Change.NEW
    with open(open_existing(path, os.O_RDONLY), "rb") as there:
        rest, same = iter(chunks), 0
        different = b""
        for chunk in rest:
            if there.read(len(chunk)) != chunk:
                different = chunk
                break
            same += len(chunk)
        if not different and not there.read(1):
            return Change.NONE
        if not replace:
            raise FileExistsError(errno.EEXIST, "is there already, with another content", os.fspath(path))
        there.seek(0)
        atomic_write(path, chain(_first(there, same), [different], rest))
    return Change.REPLACED


def _first(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The first bytes of a file, in pieces."""
    while size and (piece := file.read(min(size, 1 << 20))):
        yield piece
        size -= len(piece)


def write_new(path: Path, data: bytes, mode: int = SHARED) -> None:
    """Writes a file where there is nothing, not even a link. Raises `FileExistsError`, or another `OSError`."""
    _create(path, [data], mode, mode == SECRET)


def atomic_symlink(path: Path, target: str) -> None:
    """Replaces whatever is at `path` with a symbolic link. Raises `OSError`, also on a system without links."""
    with _beside(path) as new:
        os.symlink(target, new)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yields a name beside `path`; what was created there takes the place of `path` in the end."""
    new = path.with_name(f".{_stem(path.name)}.{os.urandom(4).hex()}.new")
    try:
        yield new
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise


def _create(path: Path, chunks: Iterable[bytes], mode: int, exact: bool) -> None:
    """Writes a new file; on an error there is none. `exact`: the umask takes nothing from `mode`."""
    descriptor = os.open(path, _NEW, mode)
    try:
        try:
            if exact and hasattr(os, "fchmod"):  # a system without it has no modes
                os.fchmod(descriptor, mode)
            _write_chunks(descriptor, chunks)
        finally:
            os.close(descriptor)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Deletes the unfinished files that killed processes left in a folder, all or those for one name.

    Safe only while nobody else writes them.
    """
    stem = "*" if name is None else escape(_stem(name))
    for leftover in folder.glob(f".{stem}.{'[0-9a-f]' * 8}.new"):
        with suppress(OSError):
            os.unlink(leftover)


def remove(path: Path) -> None:
    """Removes a file, if there is one and it can be."""
    with suppress(OSError):
        os.unlink(path)


def remove_folder(path: Path) -> None:
    """Removes a folder, if it is empty."""
    with suppress(OSError):
        os.rmdir(path)


def make_folder(path: Path, mode: int = 0o777, parents: bool = True) -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises `IsLink` if its own name is a link, or another `OSError`, also if another user may have put it there.
    """
    if parents:
        _make_parents(path.parent)
    try:
        make_new_folder(path, mode)
    except OSError:
        if not os.path.lexists(path):
            raise
        refuse_link(path)
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise _refusal(errno.ENOTDIR, "not a folder", path) from None
        _refuse_planted(path, status)


def make_new_folder(path: Path, mode: int = 0o777) -> None:
    """Makes a folder where there is nothing, not even a link. Raises `FileExistsError`, or another `OSError`."""
    os.mkdir(path, mode)
    if mode == PRIVATE:
        os.chmod(path, mode)  # whatever the umask is


def _make_parents(path: Path) -> None:
    """As `mkdir -p`, but whatever the umask is, this user may use the new folders."""
    if path.is_dir():
        return
    _make_parents(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path)
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | 0o300)


def make_own_folder(path: Path) -> Path:
    """Makes a folder for this user alone (mode 0700) unless it is there, and returns it with `follow_links` applied.

    Raises `IsLink`, or another `OSError`, also if others may write in it: they could plant files there.
    """
    path = follow_links(path)
    make_folder(path, PRIVATE)
    status = os.stat(path)
    _refuse_foreign(path, status)
    if _user() is not None and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refusal(errno.EPERM, f"others may write in it; chmod go-w {quoted(path)} ends that", path)
    return path


def make_own_file(path: Path) -> None:
    """Makes a file for this user alone unless it is there, and gives it mode 0600 in any case.

    Raises `IsLink`, or another `OSError`, also for another user's file.
    """
    descriptor = open_for_writing(path, os.O_RDWR, SECRET)
    try:
        status = os.fstat(descriptor)
        _refuse_foreign(path, status)
        if _user() is not None and stat.S_IMODE(status.st_mode) != SECRET:
            os.fchmod(descriptor, SECRET)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def quoted(word: str | os.PathLike[str]) -> str:
    """A word quoted for a shell, printable on any terminal."""
    word = os.fspath(word)
    if word.isprintable():
        return shlex.quote(word)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(plain)}'"


def _write_chunks(descriptor: int, chunks: Iterable[bytes]) -> None:
    """Writes in large pieces, and waits until all is on the disk."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        if len(buffer) > 1_000_000:
            write_all(descriptor, bytes(buffer))
            buffer.clear()
    write_all(descriptor, bytes(buffer))
    os.fsync(descriptor)


def _stem(name: str) -> str:
    """The first 200 bytes of a file's name, which leave room for a suffix."""
    return os.fsdecode(os.fsencode(name)[:200])


def _refuse_planted(path: str | os.PathLike[str], status: os.stat_result) -> None:
    """Raises `OSError` for what another user may have put in a folder that everybody may write."""
    folder = os.stat(os.path.dirname(path) or ".")
    if not folder.st_mode & stat.S_IWOTH:
        return
    if not is_this_users(status) and status.st_uid != folder.st_uid:
        raise _refusal(errno.EPERM, "belongs to another user", path)
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise _refusal(errno.EPERM, "is a file of another name, too", path)


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    if not is_this_users(status):
        raise _refusal(errno.EPERM, "belongs to another user", path)


def is_this_users(status: os.stat_result) -> bool:
    """Whether this user owns the file with this status; always true on a system whose files have no such owners."""
    return _user() in (None, status.st_uid)


def _user() -> int | None:
    """This process's user; None on a system whose files have no such owners."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def _refusal(number: int, reason: str, path: str | os.PathLike[str]) -> OSError:
    return OSError(number, reason, os.fspath(path))
