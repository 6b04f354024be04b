"""The lock of a run's folder: who is refused, what is taken over, and what a run notices while it holds it."""

import dataclasses
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from jaxdiff.training import lock as lock_module
from jaxdiff.training.lock import NAME, FolderLock, locked
from jaxdiff.training.multihost import FolderInUseError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Signs of life every tenth of a second, and half a second of patience."""
    for name, seconds in (("EVERY", 0.1), ("STALE", 0.6), ("SETTLE", 0.1)):
        monkeypatch.setattr(lock_module, name, seconds)


@pytest.fixture
def sleeper():
    """A process that lives until the test kills it."""
    with subprocess.Popen(["sleep", "100"]) as child:
        yield child
        child.kill()


def owner(folder, **changes):
    """Somebody else on another machine, by default."""
    here = lock_module._this_process(folder)
    return dataclasses.replace(here, **{"machine": "elsewhere", "host": "host-b", "process": 7} | changes)


def of(child, folder):
    machine = lock_module._this_process(folder).machine
    return owner(folder, machine=machine, process=child.pid, started=lock_module._start_time(child.pid))


def held_by(folder, someone, count=0):
    (folder / NAME).write_bytes(someone.content(count))
    return someone


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_living_process_is_left_alone(tmp_path, sleeper):
    someone = held_by(tmp_path, of(sleeper, tmp_path))
    (tmp_path / "half-written").touch()
    begun = time.monotonic()
    with pytest.raises(FolderInUseError, match=f"in use by process {sleeper.pid} on host-b.*name another folder"):
        FolderLock(tmp_path).__enter__()
    assert time.monotonic() - begun < 0.5 and names(tmp_path) == ["half-written", NAME]
    assert (tmp_path / NAME).read_bytes() == someone.content(0)


@pytest.mark.parametrize("buried", [True, False])
def test_a_killed_process_is_followed_at_once(tmp_path, sleeper, buried, capsys):
    held_by(tmp_path, of(sleeper, tmp_path))
    sleeper.kill()
    if buried:
        sleeper.wait()
    else:  # its parent has not asked for its exit code yet
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    begun = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - begun < 0.5
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"left behind by process {sleeper.pid} on host-b" in said and "taken over" in said
    assert names(tmp_path) == []


def test_another_process_with_the_number_of_a_dead_one(tmp_path, sleeper):
    held_by(tmp_path, dataclasses.replace(of(sleeper, tmp_path), started="12"))
    with FolderLock(tmp_path):
        pass


def test_another_boot_or_container_is_another_machine(tmp_path, capsys):
    """Its processes have the same numbers and may have the same host name."""
    here = lock_module._this_process(tmp_path)
    held_by(tmp_path, dataclasses.replace(here, machine="another boot pid:[1]"))
    begun = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - begun > 0.5
    waiting, taken = capsys.readouterr().err.splitlines()
    assert "for a sign of life" in waiting and "taken over" in taken


def test_a_copy_of_a_folder_in_use_is_not_in_use(tmp_path, sleeper):
    held_by(tmp_path, of(sleeper, tmp_path))
    copy = shutil.copytree(tmp_path, tmp_path / "copy")
    with FolderLock(copy):
        pass
    assert names(copy) == []


def test_a_sign_of_life_from_another_machine(tmp_path):
    someone = held_by(tmp_path, owner(tmp_path))
    timer = threading.Timer(0.3, held_by, (tmp_path, someone, 1))
    timer.start()
    with pytest.raises(FolderInUseError, match="process 7 on host-b"):
        FolderLock(tmp_path).__enter__()
    assert names(tmp_path) == [NAME]


@pytest.mark.parametrize(
    ("number", "away"),
    [(errno.EIO, (0.01, 0.585)), (errno.ESTALE, (0.1, 0.6)), (errno.ETIMEDOUT, (0.3, 0.595))],
)
def test_a_holder_that_lives_is_refused_after_an_outage(tmp_path, monkeypatch, number, away):
    """It gives signs of life whenever the network is there."""
    someone, ended, read, looks = held_by(tmp_path, owner(tmp_path)), threading.Event(), type(tmp_path).read_bytes, []

    def read_bytes(path):
        if path.name == NAME:
            looks.append(time.monotonic())
            if away[0] < looks[-1] - looks[0] < away[1]:
                raise OSError(number, "away")
        return read(path)

    def live():
        count = 0
        while not ended.wait(0.01):
            if looks and time.monotonic() - looks[0] > away[1] + 0.09 + 0.1 * count:  # the outage began just before one
                held_by(tmp_path, someone, count := count + 1)

    monkeypatch.setattr(type(tmp_path), "read_bytes", read_bytes)
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="process 7 on host-b"):
            FolderLock(tmp_path).__enter__()
    finally:
        ended.set()
        thread.join()


def test_a_look_that_hangs_is_no_silence(tmp_path, monkeypatch):
    """The network comes back after longer than the patience, and the sign of life a little later than the answer."""
    someone, read, looks = held_by(tmp_path, owner(tmp_path)), type(tmp_path).read_bytes, []

    def read_bytes(path):
        content = read(path)
        if path.name == NAME:
            looks.append(path)
            if len(looks) == 3:
                time.sleep(0.7)
                threading.Timer(0.15, held_by, (tmp_path, someone, 1)).start()
        return content

    monkeypatch.setattr(type(tmp_path), "read_bytes", read_bytes)
    with pytest.raises(FolderInUseError, match="process 7 on host-b"):
        FolderLock(tmp_path).__enter__()


def test_a_dead_holder_is_followed_after_an_outage_and_a_network_that_stays_away_is_said(tmp_path, monkeypatch):
    held_by(tmp_path, owner(tmp_path))
    read, begun, until = type(tmp_path).read_bytes, time.monotonic(), [0.4]

    def read_bytes(path):
        if path.name == NAME and 0.15 < time.monotonic() - begun < until[0]:
            raise OSError(errno.EIO, "away")
        return read(path)

    monkeypatch.setattr(type(tmp_path), "read_bytes", read_bytes)
    with FolderLock(tmp_path):
        assert time.monotonic() - begun > 0.9
    someone = held_by(tmp_path, owner(tmp_path))
    begun, until[0] = time.monotonic() + 0.1, 100
    with pytest.raises(OSError, match=r"run\.lock: cannot be read: away"):
        FolderLock(tmp_path).__enter__()
    assert read(tmp_path / NAME) == someone.content(0)


def _hidden(monkeypatch, folder, number, error):
    """/proc as it is mounted with hidepid: one process is not to be seen; a signal to it has `error`."""
    read, kill = type(folder).read_text, os.kill

    def read_text(path, *arguments, **more):
        if str(path) == f"/proc/{number}/stat":
            raise FileNotFoundError(errno.ENOENT, "hidden")
        return read(path, *arguments, **more)

    def killed(process, signal):
        if (process, signal) != (number, 0):
            return kill(process, signal)
        if error is not None:
            raise error

    monkeypatch.setattr(type(folder), "read_text", read_text)
    monkeypatch.setattr(os, "kill", killed)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
@pytest.mark.parametrize("error", [PermissionError(), None])
@pytest.mark.parametrize("beats", [True, False])
def test_a_process_that_is_hidden_is_judged_by_its_signs_of_life(tmp_path, monkeypatch, sleeper, error, beats):
    someone = held_by(tmp_path, of(sleeper, tmp_path))
    _hidden(monkeypatch, tmp_path, sleeper.pid, error)
    begun = time.monotonic()
    if beats:
        threading.Timer(0.3, held_by, (tmp_path, someone, 1)).start()
        with pytest.raises(FolderInUseError, match=f"process {sleeper.pid}"):
            FolderLock(tmp_path).__enter__()
    else:
        with FolderLock(tmp_path):
            assert time.monotonic() - begun > 0.5


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
@pytest.mark.parametrize("number", [0, -1, 2**31 - 1, 10**30])
def test_a_number_that_no_process_has_is_followed_at_once(tmp_path, number):
    held_by(tmp_path, dataclasses.replace(lock_module._this_process(tmp_path), process=number, started="12"))
    begun = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - begun < 0.5


def test_a_lock_that_is_released_while_one_waits(tmp_path):
    held_by(tmp_path, owner(tmp_path))
    threading.Timer(0.2, (tmp_path / NAME).unlink).start()
    begun = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - begun < 0.5


def test_a_lock_that_another_takes_over_while_one_waits(tmp_path, sleeper):
    held_by(tmp_path, owner(tmp_path))
    threading.Timer(0.2, held_by, (tmp_path, of(sleeper, tmp_path))).start()
    with pytest.raises(FolderInUseError, match=f"process {sleeper.pid}"):
        FolderLock(tmp_path).__enter__()


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"7", b"[" * 100_000, b'{"process": 1}', b"\xff\xfe"])
def test_a_damaged_lock_is_taken_over_when_nobody_mends_it(tmp_path, content, capsys):
    (tmp_path / NAME).write_bytes(content)
    with FolderLock(tmp_path) as held:
        held.check()
    assert "cannot be named" in capsys.readouterr().err and names(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("left", ["nothing", "a dead lock"])
def test_of_many_that_start_at_once_one_has_it(tmp_path, monkeypatch, request, links, left):
    if not links:

        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-5)  # so that threads meet in the middle of a takeover
    for number in range(50 if links else 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        if left == "a dead lock":
            held_by(folder, dataclasses.replace(lock_module._this_process(folder), started="12"))
        begin, end, won, refused = threading.Barrier(8), threading.Event(), [], []

        def start(folder=folder, begin=begin, end=end, won=won, refused=refused):
            held = FolderLock(folder)
            begin.wait()
            try:
                with held:
                    won.append(held)
                    if len(won) + len(refused) < 8:
                        end.wait(10)
                    held.check()
            except FolderInUseError as error:
                refused.append(error)
            if len(won) + len(refused) == 8:
                end.set()

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 7)
        assert names(folder) == []


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_takeover_that_was_killed_is_followed(tmp_path, depth, damaged):
    dead = dataclasses.replace(lock_module._this_process(tmp_path), started="12")
    content = b"{" if damaged else dead.content(3)
    (tmp_path / NAME).write_bytes(content)
    for level in range(depth):  # the claim on the lock, and one on the claim
        claim = tmp_path / f".{NAME}-{hashlib.sha256(content).hexdigest()[:16]}-claim"
        content = dead.content(level)
        claim.write_bytes(content)
    with FolderLock(tmp_path) as held:
        held.check()
    assert names(tmp_path) == []


def test_who_comes_late_moves_no_living_lock(tmp_path, monkeypatch):
    """It read the dead lock, and acts on that after another start has taken it over."""
    dead = held_by(tmp_path, dataclasses.replace(lock_module._this_process(tmp_path), started="12"))
    late = FolderLock(tmp_path)
    late._owner = lock_module._this_process(tmp_path)
    with FolderLock(tmp_path) as held:
        seen = []
        monkeypatch.setattr(os, "rename", lambda *paths: seen.append(paths))
        monkeypatch.setattr(type(tmp_path), "unlink", lambda path, **_: seen.append(path.name) or os.unlink(path))
        assert not late._remove(late.path, dead.content(0))
        assert NAME not in seen and not [paths for paths in seen if isinstance(paths, tuple)]
        monkeypatch.undo()
        held.check()


def test_a_block_in_a_block_is_the_same_lock(tmp_path):
    with locked(tmp_path) as outer:
        with locked(tmp_path) as inner:
            inner.check()
        outer.check()
        refused = []

        def start():
            with pytest.raises(FolderInUseError), locked(tmp_path):
                pass
            refused.append(True)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        assert refused
    assert names(tmp_path) == []


@pytest.fixture
def changing_inodes(monkeypatch):
    """A file system that numbers a folder anew at every look."""
    this_process, looks = lock_module._this_process, []

    def changed(folder):
        looks.append(folder)
        return dataclasses.replace(this_process(folder), folder=f"1 {len(looks)}")

    monkeypatch.setattr(lock_module, "_this_process", changed)


@pytest.mark.usefixtures("changing_inodes")
def test_a_block_in_a_block_is_the_same_lock_whatever_the_inode(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    begun = time.monotonic()
    with locked(tmp_path / "run") as outer:
        with locked(tmp_path / "run") as inner, locked(tmp_path / "link") as linked:
            inner.check()
            linked.check()
        outer.check()
        assert time.monotonic() - begun < 0.5
        refused = []

        def start():
            with pytest.raises(FolderInUseError), locked(tmp_path / "run"):
                pass
            refused.append(True)

        thread = threading.Thread(target=start)  # another thread, and another folder with the same lock, are others
        thread.start()
        thread.join()
        assert refused
        copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with FolderLock(copy) as other:
            assert other._owner.token != outer._owner.token
    assert names(tmp_path / "run") == names(copy) == [] and not lock_module._HELD


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path, monkeypatch):
    """It has the parent's memory and thread, and another number."""
    with locked(tmp_path) as held:
        this_process = lock_module._this_process(tmp_path)
        child = dataclasses.replace(this_process, process=this_process.process + 1, folder="1 1")
        monkeypatch.setattr(lock_module, "_this_process", lambda folder: child)
        with pytest.raises(FolderInUseError):
            FolderLock(tmp_path).__enter__()
        held.check()


def test_the_lock_is_released_whatever_happens_and_no_empty_folder_is_left(tmp_path):
    new = tmp_path / "new"
    for error in (ValueError, SystemExit, KeyboardInterrupt):
        with pytest.raises(error), FolderLock(new):
            assert names(new) == [NAME]
            raise error
        assert not new.exists()
    with pytest.raises(ValueError), FolderLock(new):
        (new / "result").touch()
        raise ValueError
    assert names(new) == ["result"]


def test_signs_of_life_are_given_and_never_in_anothers_lock(tmp_path):
    with FolderLock(tmp_path) as held:
        first = (tmp_path / NAME).read_bytes()
        time.sleep(0.35)
        second = (tmp_path / NAME).read_bytes()
        assert first != second and len(first) == len(second)
        assert held.due()
        held.check()
        assert not held.due()
        other = held_by(tmp_path, owner(tmp_path))
        time.sleep(0.25)
        with pytest.raises(FolderInUseError, match="held by process 7 on host-b"):
            held.check()
    assert (tmp_path / NAME).read_bytes() == other.content(0)


def test_one_that_does_not_hold_it_does_nothing(tmp_path):
    with FolderLock(tmp_path / "none", active=False) as held:
        held.check()
        assert not held.due()
    assert names(tmp_path) == []


def _replaced(folder):
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda folder: (folder / NAME).unlink(), FolderInUseError, "run.lock: was removed or damaged"),
        (lambda folder: (folder / NAME).write_bytes(b"\0" * 100), FolderInUseError, "was removed or damaged"),
        (lambda folder: folder.rename(folder.with_name("moved")), FileNotFoundError, "run: was deleted while"),
        (shutil.rmtree, FileNotFoundError, "run: was deleted while the run wrote to it"),
        (_replaced, FileNotFoundError, "run: was replaced by a file"),
        (lambda folder: (folder / "checkpoints").rmdir(), FileNotFoundError, "run/checkpoints: was deleted"),
    ],
)
def test_what_happens_to_the_folder_is_noticed(tmp_path, change, error, words):
    folder = tmp_path / "run"
    with FolderLock(folder) as held:
        (folder / "checkpoints").mkdir()
        held.check(folder / "checkpoints")
        change(folder)
        with pytest.raises(error, match=words):
            held.check(folder / "checkpoints")


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EACCES])
def test_a_network_that_is_away_for_a_moment_ends_no_run(tmp_path, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, "away")

    with FolderLock(tmp_path) as held:
        for method in ("stat", "read_bytes"):
            with monkeypatch.context() as away:
                away.setattr(type(tmp_path), method, fail)
                held.check()
        with monkeypatch.context() as away:
            away.setattr(type(tmp_path), "stat", lambda *_: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
            with pytest.raises(FileNotFoundError, match="was deleted"):
                held.check()


def test_a_lock_that_is_put_back_soon_is_not_lost(tmp_path):
    with FolderLock(tmp_path) as held:
        (tmp_path / NAME).rename(tmp_path / "aside")
        threading.Timer(0.1, (tmp_path / "aside").rename, (tmp_path / NAME,)).start()
        held.check()


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file: a file, name a folder"):
        FolderLock(tmp_path / "file").__enter__()
    with pytest.raises(OSError, match="file/below: cannot be made: Not a directory"):
        FolderLock(tmp_path / "file" / "below").__enter__()
    (tmp_path / NAME).symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"run\.lock: can be neither created nor read"):
        FolderLock(tmp_path).__enter__()
