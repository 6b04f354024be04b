"""One run a folder: a lock that is held in it while a run goes on, so that a second start does not destroy the first.

    with locked(out) as lock:     # of several processes, process 0 holds it
        ...
        lock.check()              # before writing: raises where the folder is gone or another run has it

The lock is a small file: who holds it (host, process, its start time) and a counter that a thread raises every
`EVERY` seconds. It is created by a hard link, which is exclusive on network file systems too; where there are none
(buckets), by exclusive creation and a second look. Locks of the operating system are not used: many network file
systems have none that other hosts see.

A lock that a dead run has left is taken over. On the same machine the process table says at once whether the holder
lives; for another machine, or where the table hides the processes of others, the counter must stand still for `STALE`
seconds by the clock of whoever waits, so that clocks which differ do not matter. Seconds in which the file could not be
read do not count, because the holder could not write then either.
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
"""Seconds between two signs of life."""
STALE = 60.0
"""Seconds without one after which the lock of another machine counts as left behind."""
SETTLE = 2.0
"""Seconds after which a file system without hard links must show which of two locks has won."""
_HELD: dict[str, "_Owner"] = {}
"""The locks that this process holds, by the resolved path of the file. Module state, because it mirrors a fact of the
process: the file alone cannot show it where a file system gives a folder another inode at every look."""
_HELD_GUARD = threading.Lock()
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL}


@contextmanager
def locked(folder: str | Path) -> Iterator["FolderLock"]:
    """The lock of a run's folder, which process 0 holds until the block ends; the folder is made where it is missing.

    Within a block of the same folder, in the same thread, a second one is the same lock. Raises
    `multihost.FolderInUseError` where another run has the folder; OSError where nothing can be written to it.
    """
    with FolderLock(folder, active=multihost.index() == 0) as lock:
        yield lock


class FolderLock:
    """A context manager that holds `folder`/`name`. active=False: another process holds it, and this does nothing."""

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
        self._thread.join(EVERY)  # it may hang with the file system
        with suppress(OSError):
            if self._mine(self._read(self.path)):
                self.path.unlink()
        if kind is not None:
            self._remove_new_folder()

    def due(self) -> bool:
        """Whether `EVERY` seconds have passed since the last check."""
        return self._active and time.monotonic() - self._looked >= EVERY

    def check(self, *folders: Path) -> None:
        """Raises FileNotFoundError where the folder, or one of `folders` in it, is gone, and
        `multihost.FolderInUseError` where the lock is not this run's any more. To be called before anything is
        written."""
        if not self._active:
            return
        self._looked = time.monotonic()
        for pause in (0.2, 0.8):  # a network may show a sign of life half written
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
        except OSError:  # a network that is away for a moment: writing will tell
            return None
        if self._mine(content):
            return None
        holder = _owner_of(content)
        what = f"is held by {holder.words()} now" if holder else "was removed or damaged"
        return multihost.FolderInUseError(
            f"{self.path}: {what}, and another run may write here; stopped without writing"
        )

    # Taking it.

    def _take(self) -> None:
        missed = 0
        while not self._create(self.path):
            content = self._read(self.path)
            if content is None:  # gone since; but a link that leads nowhere stays
                missed += 1
                if missed > 40:
                    raise OSError(f"{self.path}: can be neither created nor read")
                time.sleep(0.05)
                continue
            if self._mine(content):  # a network had lost the answer to its creation
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
        """Whether this thread holds the lock already: by what the file says, or by the locks that the process has."""
        if holder.is_this_thread(self._owner):
            return True
        with _HELD_GUARD:
            held = _HELD.get(os.path.realpath(self.path))
        if held is None or held.token != holder.token:
            return False
        return held.is_this_thread(replace(self._owner, folder=held.folder))  # a forked child has the dict, too

    def _create(self, path: Path) -> bool:
        """Whether the lock at `path` is ours now; False where there is one already."""
        temporary = path.with_name(f".{self.path.name}-{self._owner.token}")
        try:
            temporary.write_bytes(self._owner.content(0))
            try:
                os.link(temporary, path)
                return True
            except FileExistsError:
                return temporary.stat().st_nlink == 2  # a network may have lost the answer to a link that was made
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
        """Whether the counter moves within `STALE` seconds; None where the lock has gone or changed hands meanwhile.

        The seconds begin again after a look that failed or took longer than `EVERY`: the network was away, and with it
        the holder's signs of life. OSError where no look succeeds for `STALE` seconds.
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
        """Whether the lock at `path`, which a dead run left with this content, is gone, by us.

        Of several that try, one has the right: whoever creates the claim on this content, which is a lock like any
        other. The holder of the claim alone removes this content, so that a lock which was created since, by whoever
        was faster, stays where it is.
        """
        claim = path.with_name(f".{self.path.name}-{hashlib.sha256(content).hexdigest()[:16]}-claim")
        if not self._create(claim):
            left = self._read(claim)
            if left is not None and self._lives(claim, left) is False:
                self._remove(claim, left)  # its holder died within these lines
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
        """Whether the holder of a lock lives; None where the lock has gone or changed hands while we looked."""
        holder = _owner_of(content)
        lives = holder.lives(self._owner) if holder else None
        if lives is not None:
            return lives
        if path not in self._waited_for:
            self._waited_for.add(path)
            _say(f"{path}: held by {_words(holder)}; waiting up to {STALE:.0f} s for a sign of life")
        return self._shows_life(path, content)

    # Holding it.

    def _live(self) -> None:
        count = 0
        while not self._ended.wait(EVERY):
            count += 1
            with suppress(OSError), self.path.open("r+b", buffering=0) as file:
                if self._mine(file.read()):
                    file.seek(0)
                    file.write(self._owner.content(count))  # of the same length

    def _read(self, path: Path) -> bytes | None:
        """The lock's content, None where there is none. Opened anew: that is when a network file system looks."""
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
        """A run that was refused, or failed before it wrote anything, leaves no empty folder."""
        if self._new_folder:
            with suppress(OSError):
                self.folder.rmdir()


@dataclass(frozen=True)
class _Owner:
    token: str
    host: str
    machine: str  # equal for two processes that see the same process table
    process: int
    started: str  # in whatever unit; numbers of processes are used again
    thread: int
    folder: str  # a copy of it, with the lock of the original, is another
    since: str

    def content(self, count: int) -> bytes:
        return (json.dumps({**asdict(self), "count": f"{count:012d}"}) + "\n").encode()

    def words(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since})"

    def is_this_thread(self, here: "_Owner") -> bool:
        return replace(self, token=here.token, since=here.since) == here

    def lives(self, here: "_Owner") -> bool | None:
        """Whether the process is there; None where only its own machine knows, it holds another folder, or the
        process table hides it."""
        if not self.machine or (self.machine, self.folder) != (here.machine, here.folder):
            return None
        started = _start_time(self.process)
        return None if started is None else started == self.started


def _gone(folder: Path) -> str:
    """What became of a folder that was there; nothing where it still is."""
    try:
        return "" if stat.S_ISDIR(folder.stat().st_mode) else "replaced by a file"
    except (FileNotFoundError, NotADirectoryError):
        return "deleted"
    except OSError as error:
        if error.errno == errno.ESTALE:  # what a network file system says of it
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
    """Who is named in a lock, None where it is damaged."""
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
    """Names the process table that this process is in: that of a boot, and of a container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "" if sys.platform == "linux" else f"{sys.platform} {socket.gethostname()}"


def _start_time(process: int) -> str | None:
    """When a process of this machine began; empty where there is none, or only what its parent has not yet buried; None
    where there is one of which nothing can be read (/proc mounted with hidepid hides the processes of others)."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # its name may hold anything
        except OSError:
            return None if is_alive(process) else ""
        return "" if fields[0] in "ZX" else fields[19]
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(process)], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
