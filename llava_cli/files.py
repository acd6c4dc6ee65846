"""Every file and folder that we create: never through a link that somebody else has put there, and whole or not at all.

Where a name may be anybody's guess (a socket's lock in a shared folder, a report beside unpacked rows), a link of that
name would have us write wherever it leads. So what is new is opened with `O_NOFOLLOW`, or written beside its place and
renamed, which replaces a link and leaves what it led to alone. In a folder that everybody may write, what is there
already has to be this user's or the folder's owner's, and without a second name: the rule of Linux's
`fs.protected_regular` and `fs.protected_hardlinks`, also where those are off.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
_BINARY = getattr(os, "O_BINARY", 0)  # and nobody else has that
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY
_LINKS = 40
"""In a row: as many as Linux follows."""
SECRET = 0o600
"""The mode of what is its owner's alone: keys, chats, logs."""
PRIVATE = 0o700
"""The mode of a folder that is its owner's alone."""
SHARED = 0o666
"""The mode of what the user's umask decides."""


class IsLink(OSError):
    """A path that is to be written is a symbolic link; `strerror` says where it leads, as `target` does from here."""

    def __init__(self, path: str, target: str) -> None:
        super().__init__(errno.ELOOP, f"is a link to {target}", path)
        self.target = os.path.join(os.path.dirname(path), target)


def open_for_writing(path: str | os.PathLike[str], flags: int, mode: int) -> int:
    """A descriptor of the regular file at `path`, made with `mode` where there is none.

    `flags` are those of `os.open` besides `O_CREAT`. Raises `IsLink`, or another `OSError`, also for what is neither
    a regular file nor absent, and for what another user may have put there.
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
    """As `open_for_writing`, for a file that has been opened so before: it has to be there."""
    # Not blocking: a FIFO would otherwise wait for its other end, which may never come.
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
    """Raises `IsLink` where a path is a symbolic link."""
    try:
        target = os.readlink(path)
    except OSError:  # it is none
        return
    raise IsLink(os.fspath(path), target)


def refuse_irregular(path: str | os.PathLike[str]) -> os.stat_result | None:
    """What is there, or None; raises `IsLink`, or another `OSError`, where that is no regular file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    refuse_link(path)
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(errno.EINVAL, "not a regular file", path)
    return status


def followed(path: Path) -> Path:
    """Where the links lead that this user keeps in a file's or folder's place: into a folder of dotfiles, to a disk.

    Raises `IsLink` where another user made one of them, or has what is at its end.
    """
    first, trusted = path, (0, _user())
    for _ in range(_LINKS):
        try:
            target = os.readlink(path)
        except OSError:  # no link, or nothing there yet
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


def write(descriptor: int, data: bytes) -> None:
    """All of `data`, however many calls that takes; on an error none, as far as the disk allows."""
    size = os.fstat(descriptor).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        with suppress(OSError):
            cut(descriptor, size)
        raise


def cut(descriptor: int, size: int) -> None:
    """Throws away what is behind `size` bytes."""
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)


def put(path: Path, chunks: Iterable[bytes], mode: int = SHARED) -> None:
    """A file with this content in the place of whatever was there: readers see one or the other.

    One of this user's that is there keeps its mode; a new one gets `mode`. Raises `IsLink`, or another `OSError`, also
    for what is neither a regular file nor absent.
    """
    there = refuse_irregular(path)
    kept = stat.S_IMODE(there.st_mode) & 0o777 if there and is_this_users(there) else None
    new = path.with_name(f".{_beginning(path.name)}.{os.urandom(4).hex()}.new")
    descriptor = os.open(new, _NEW, mode if kept is None else kept)
    try:
        try:
            if kept is not None or mode == SECRET:
                _set_mode(descriptor, mode if kept is None else kept)
            _write_all(descriptor, chunks)
        finally:
            os.close(descriptor)
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    sync_folder(path.parent)


def put_new(path: Path, data: bytes, mode: int = SHARED) -> None:
    """A file where there is nothing, not even a link. Raises `FileExistsError`, or another `OSError`."""
    descriptor = os.open(path, _NEW, mode)
    try:
        try:
            if mode == SECRET:
                _set_mode(descriptor, mode)
            _write_all(descriptor, [data])
        finally:
            os.close(descriptor)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def put_link(path: Path, target: str) -> None:
    """A symbolic link in the place of whatever was there. Raises `OSError`, also where a system has no links."""
    new = path.with_name(f".{_beginning(path.name)}.{os.urandom(4).hex()}.new")
    os.symlink(target, new)
    try:
        os.replace(new, path)
    except OSError:
        os.unlink(new)
        raise


def clear(folder: Path, name: str | None = None) -> None:
    """Deletes what killed processes have left of what they put in a folder, or of one file in it.

    Only for those that nobody else puts meanwhile.
    """
    beginning = "*" if name is None else escape(_beginning(name))
    for left in folder.glob(f".{beginning}.{'[0-9a-f]' * 8}.new"):
        with suppress(OSError):
            os.unlink(left)


def make_folder(path: Path, mode: int = 0o777, parents: bool = True) -> None:
    """A folder, and those above it.

    Raises `IsLink` where its own name is a link, or another `OSError`, also for one that another user may have put
    there.
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
    """A folder where there is nothing, not even a link. Raises `FileExistsError`, or another `OSError`."""
    os.mkdir(path, mode)
    if mode == PRIVATE:
        os.chmod(path, mode)  # whatever the umask is


def _make_parents(path: Path) -> None:
    """As `mkdir -p`: the umask decides about others, but this user may use what is made."""
    if path.is_dir():
        return
    _make_parents(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path)
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | 0o300)


def make_own_folder(path: Path) -> Path:
    """A folder of this user's alone, made with mode 0700 where there is none, and where it is (see `followed`).

    Raises `IsLink`, or another `OSError`, also for one that others may write: they could plant files in it.
    """
    path = followed(path)
    make_folder(path, PRIVATE)
    status = os.stat(path)
    _refuse_foreign(path, status)
    if _user() is not None and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refusal(errno.EPERM, f"others may write in it; chmod go-w {quoted(path)} ends that", path)
    return path


def make_own_file(path: Path) -> None:
    """A file of this user's alone, made where there is none: of mode 0600, whatever it was before.

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
    """Makes sure that the names in a folder are on the disk."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def quoted(word: str | os.PathLike[str]) -> str:
    """A word as it can be typed again in a shell, and printed on any terminal."""
    word = os.fspath(word)
    if word.isprintable():
        return shlex.quote(word)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(plain)}'"


def _set_mode(descriptor: int, mode: int) -> None:
    """Gives an open file exactly this mode, whatever the umask is."""
    if hasattr(os, "fchmod"):  # else a system without modes
        os.fchmod(descriptor, mode)


def _write_all(descriptor: int, chunks: Iterable[bytes]) -> None:
    """In large pieces, and on the disk in the end."""
    waiting = bytearray()
    for chunk in chunks:
        waiting += chunk
        if len(waiting) > 1_000_000:
            write(descriptor, bytes(waiting))
            waiting.clear()
    write(descriptor, bytes(waiting))
    os.fsync(descriptor)


def _beginning(name: str) -> str:
    """Of a file's name, so much that there is room for more behind it."""
    return os.fsdecode(os.fsencode(name)[:200])


def _refuse_planted(path: str | os.PathLike[str], status: os.stat_result) -> None:
    """Raises `OSError` for what another user may have put where everybody may write."""
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
    """Whether this user owns what has this status; so it is on a system where files have no such owners."""
    return _user() in (None, status.st_uid)


def _user() -> int | None:
    """This process's user; None on a system where files have no such owners."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def _refusal(number: int, reason: str, path: str | os.PathLike[str]) -> OSError:
    return OSError(number, reason, os.fspath(path))
