"""One run per folder: a lock file that a run holds, so that a second run cannot damage the first.

    with locked(out) as lock:     # held by process 0
        ...
        lock.check()              # before writing: raises if the folder is gone or another run holds it

The lock is a small file with its holder (host, process, start time) and a counter that a thread increments every
`EVERY` seconds. It is created by a hard link, which is atomic on network file systems too; on file systems without hard
links (buckets), by exclusive creation and a second read. Operating system locks are not used: on many network file
systems other hosts do not see them.

The lock of a dead run is taken over. On the same machine the process table shows whether the holder is alive. For
another machine, or if the process table is hidden, the counter must not change for `STALE` seconds on the waiting
process's clock, so clock differences do not matter. Seconds in which the file is unreadable do not count, because the
holder cannot write then either.
"""

import errno
import hashlib
import json
import os
import secrets
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxdiff.core.files import is_alive
from jaxdiff.training import multihost

NAME = "run.lock"
EVERY = 10.0
"""Seconds between two heartbeats."""
STALE = 60.0
"""Seconds without a heartbeat after which the lock of another machine is stale."""
SETTLE = 2.0
"""Seconds after which a file system without hard links must show a consistent lock file."""
_HELD: dict[str, "_Owner"] = {}
"""The locks held by this process, by resolved path. Module state, because the file alone is not enough on file systems
that change a folder's inode at every access."""
_HELD_GUARD = threading.Lock()
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL}


@contextmanager
def locked(folder: str | Path) -> Iterator["FolderLock"]:
    """Hold the lock of a run's folder on process 0 for the block; creates the folder if necessary.

    Reentrant for the same folder in the same thread. Raises `multihost.FolderInUseError` if another run holds the
    folder; OSError if it is not writable.
    """
    with FolderLock(folder, active=multihost.index() == 0) as lock:
        yield lock


class FolderLock:
    """Context manager that holds `folder`/`name`. active=False: does nothing, because another process holds it."""

    def __init__(self, folder: str | Path, name: str = NAME, active: bool = True) -> None:
        self.folder = Path(folder).absolute()
        self.path = self.folder / name
        self._active = active
        self._nested = self._new_folder = False
        self._ended = threading.Event()
        self._looked = time.monotonic()
        self._waited_for: set[Path] = set()

    def __enter__(self) -> "FolderLock":
        if self._active:
            self._make_folder()
            self._owner = _this_process(self.folder)
            try:
                self._take()
            except BaseException:
                self._remove_new_folder()
                raise
            if not self._nested:
                with _HELD_GUARD:
                    _HELD[os.path.realpath(self.path)] = self._owner
                self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
                self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if not self._active or self._nested:
            return
        with _HELD_GUARD:
            for path in [path for path, owner in _HELD.items() if owner is self._owner]:
                del _HELD[path]
        self._ended.set()
        self._thread.join(EVERY)  # it may hang in the file system
        with suppress(OSError):
            if self._mine(self._read(self.path)):
                self.path.unlink()
        if kind is not None:
            self._remove_new_folder()

    def due(self) -> bool:
        """Whether `EVERY` seconds have passed since the last check."""
        return self._active and time.monotonic() - self._looked >= EVERY

    def check(self, *folders: Path) -> None:
        """Raises FileNotFoundError if the folder, or one of `folders` in it, is gone, and `multihost.FolderInUseError`
        if this run no longer holds the lock. Call it before writing."""
        if not self._active:
            return
        self._looked = time.monotonic()
        for pause in (0.2, 0.8):  # a network file system may show a partially written heartbeat
            if self._problem(folders) is None:
                return
            time.sleep(pause)
        problem = self._problem(folders)
        if problem is not None:
            raise problem

    def _problem(self, folders: tuple[Path, ...]) -> Exception | None:
        try:
            for folder in (self.folder, *folders):
                what = _gone(folder)
                if what:
                    return FileNotFoundError(f"{folder}: was {what} while the run wrote to it; stopped without writing")
            content = self._read(self.path)
        except OSError:  # a temporary network failure: writing will raise
            return None
        if self._mine(content):
            return None
        holder = _owner_of(content)
        what = f"is held by {holder.words()} now" if holder else "was removed or damaged"
        return multihost.FolderInUseError(
            f"{self.path}: {what}, and another run may write here; stopped without writing"
        )

    # Acquiring

    def _take(self) -> None:
        missed = 0
        while not self._create(self.path):
            content = self._read(self.path)
            if content is None:  # removed meanwhile; but a dangling link remains
                missed += 1
                if missed > 40:
                    raise OSError(f"{self.path}: can be neither created nor read")
                time.sleep(0.05)
                continue
            if self._mine(content):  # the reply to its creation was lost on the network
                return
            holder = _owner_of(content)
            if holder is not None and self._held_here(holder):
                self._owner, self._nested = holder, True
                return
            lives = self._lives(self.path, content)
            if lives:
                what = "wait until it has ended, stop it, or name another folder"
                raise multihost.FolderInUseError(f"{self.folder}: in use by {_words(holder)}: {what}")
            if lives is False and self._remove(self.path, content):
                _say(f"{self.path}: left behind by {_words(holder)}, which has ended; taken over")

    def _held_here(self, holder: "_Owner") -> bool:
        """Whether this thread already holds the lock, according to the file or to `_HELD`."""
        if holder.is_this_thread(self._owner):
            return True
        with _HELD_GUARD:
            held = _HELD.get(os.path.realpath(self.path))
        if held is None or held.token != holder.token:
            return False
        return held.is_this_thread(replace(self._owner, folder=held.folder))  # a forked child inherits the dict

    def _create(self, path: Path) -> bool:
        """Create the lock at `path`; False if one exists."""
        temporary = path.with_name(f".{self.path.name}-{self._owner.token}")
        try:
            temporary.write_bytes(self._owner.content(0))
            try:
                os.link(temporary, path)
                return True
            except FileExistsError:
                return temporary.stat().st_nlink == 2  # the reply to a successful link may be lost on the network
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._create_without_links(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(f"{self.folder}: cannot be written to: {error.strerror or error}") from error

    def _create_without_links(self, path: Path) -> bool:
        try:
            with path.open("xb") as file:
                file.write(self._owner.content(0))
        except FileExistsError:
            return False
        time.sleep(SETTLE)
        return self._mine(self._read(path))

    def _shows_life(self, path: Path, content: bytes) -> bool | None:
        """Whether the counter changes within `STALE` seconds; None if the lock is removed or changes its holder.

        The timer restarts after a read that fails or takes longer than `EVERY`, because the holder could not write
        either. OSError if no read succeeds for `STALE` seconds.
        """
        quiet_since = seen = time.monotonic()
        while time.monotonic() - quiet_since < STALE:
            begun = time.monotonic()
            time.sleep(min(0.5, EVERY / 4))
            try:
                now = self._read(path)
            except OSError as error:
                quiet_since = time.monotonic()
                if quiet_since - seen > STALE:
                    raise OSError(f"{path}: cannot be read: {error.strerror or error}") from error
                continue
            if now != content:
                same = now is not None and _token(now) is not None and _token(now) == _token(content)
                return True if same else None
            seen = time.monotonic()
            if seen - begun > EVERY:
                quiet_since = seen
        return False

    def _remove(self, path: Path, content: bytes) -> bool:
        """Remove a dead run's lock with this content; whether this process removed it.

        Of several contenders, the one that creates a claim file for this content may remove it; a claim is itself a
        lock. Thus a lock that a faster contender has created since is never removed.
        """
        claim = path.with_name(f".{self.path.name}-{hashlib.sha256(content).hexdigest()[:16]}-claim")
        if not self._create(claim):
            left = self._read(claim)
            if left is not None and self._lives(claim, left) is False:
                self._remove(claim, left)  # its holder died while removing
            else:
                time.sleep(0.01)
            return False
        try:
            if self._read(path) != content:
                return False
            path.unlink(missing_ok=True)
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _lives(self, path: Path, content: bytes) -> bool | None:
        """Whether the holder of a lock is alive; None if the lock is removed or changes its holder meanwhile."""
        holder = _owner_of(content)
        lives = holder.lives(self._owner) if holder else None
        if lives is not None:
            return lives
        if path not in self._waited_for:
            self._waited_for.add(path)
            _say(f"{path}: held by {_words(holder)}; waiting up to {STALE:.0f} s for a sign of life")
        return self._shows_life(path, content)

    # Holding

    def _live(self) -> None:
        count = 0
        while not self._ended.wait(EVERY):
            count += 1
            with suppress(OSError), self.path.open("r+b", buffering=0) as file:
                if self._mine(file.read()):
                    file.seek(0)
                    file.write(self._owner.content(count))  # of the same length

    def _read(self, path: Path) -> bytes | None:
        """The content of the lock, None if there is none. Opening it anew makes a network file system refresh it."""
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None
            raise

    def _mine(self, content: bytes | None) -> bool:
        return content is not None and _token(content) == self._owner.token

    def _make_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder}: a file, name a folder")
        try:
            self._new_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.folder}: cannot be made: {error.strerror}") from error

    def _remove_new_folder(self) -> None:
        """Remove the new folder of a run that failed before writing anything."""
        if self._new_folder:
            with suppress(OSError):
                self.folder.rmdir()


@dataclass(frozen=True)
class _Owner:
    token: str
    host: str
    machine: str  # equal for processes with the same process table
    process: int
    started: str  # in any unit; process ids are reused
    thread: int
    folder: str  # distinguishes a copy of the folder
    since: str

    def content(self, count: int) -> bytes:
        return (json.dumps({**asdict(self), "count": f"{count:012d}"}) + "\n").encode()

    def words(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since})"

    def is_this_thread(self, here: "_Owner") -> bool:
        return replace(self, token=here.token, since=here.since) == here

    def lives(self, here: "_Owner") -> bool | None:
        """Whether the process is alive; None for another machine, another folder, or a hidden process table."""
        if not self.machine or (self.machine, self.folder) != (here.machine, here.folder):
            return None
        started = _start_time(self.process)
        return None if started is None else started == self.started


def _gone(folder: Path) -> str:
    """What happened to a folder; empty if it still exists."""
    try:
        return "" if stat.S_ISDIR(folder.stat().st_mode) else "replaced by a file"
    except (FileNotFoundError, NotADirectoryError):
        return "deleted"
    except OSError as error:
        if error.errno == errno.ESTALE:  # the error of a network file system
            return "deleted"
        raise


def _this_process(folder: Path) -> _Owner:
    place = folder.stat()
    return _Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=_machine(),
        process=os.getpid(),
        started=_start_time(os.getpid()) or "",
        thread=threading.get_ident(),
        folder=f"{place.st_dev} {place.st_ino}",
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )


def _owner_of(content: bytes | None) -> _Owner | None:
    """The owner in a lock's content, None if it is damaged."""
    try:
        values = json.loads(content or b"")
        owner = _Owner(**{name: values[name] for name in _Owner.__dataclass_fields__})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = isinstance(owner.process, int) and isinstance(owner.thread, int)
    texts = all(isinstance(value, str) for name, value in asdict(owner).items() if name not in ("process", "thread"))
    return owner if numbers and texts else None


def _words(holder: _Owner | None) -> str:
    return holder.words() if holder else "a run that cannot be named (the file is damaged)"


def _token(content: bytes) -> str | None:
    owner = _owner_of(content)
    return None if owner is None else owner.token


def _machine() -> str:
    """Identifies the process table: the boot and the PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "" if sys.platform == "linux" else f"{sys.platform} {socket.gethostname()}"


def _start_time(process: int) -> str | None:
    """Start time of a process of this machine; empty if there is none or it is a zombie; None if it exists but cannot
    be inspected (/proc mounted with hidepid)."""
    if Path("/proc/self/stat").exists():
        try:
            # The process name, in parentheses, may contain anything.
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None if is_alive(process) else ""
        return "" if fields[0] in "ZX" else fields[19]
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(process)], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
