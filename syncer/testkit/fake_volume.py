"""A Modal Volume for tests, at its strictest: several hosts, each with a folder of its own.

    volume = FakeVolume(tmp_path)
    api, worker = volume.host("api"), volume.host("worker")
    (api.folder / "a").write_text("1")
    api.commit()                              # or lost, when api.die() comes first
    worker.reload()                           # not seen before
    api.faults(CommitFault(error="504"))      # of the next commits, in order

What it does as Modal does: nothing is seen elsewhere before a commit by the writer and a reload (or
a commit, which reloads too) by the reader; the last commit of a file wins as a whole; both calls
fail while a file or the working directory of this process is open on the mount, a commit then after
it took effect; the mount looks empty during a reload, and what is written into it then is lost;
more than five commits at once are refused. What Modal leaves open, the seed or the test chooses.

Background commits capture a prefix of what was done since the last commit. What was done is told
from the folder: each `observe()` adds the differences since the one before as one step.
`host.calls` are system calls for `segment_files` that observe after each of them and write a few
bytes at a time. Changes that nobody observed one by one have no known order: a background commit
takes each file as a step, in an order by seed, deletions included.

Its limits: files only, read whole at each look (no empty folders, links or modes); hosts are
threads of one process.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from local_store.clock import Clock, SystemClock
from local_store.segment_folders import DiskCalls

COMMITTERS_MAX = 5  # Modal's own limit for its first version of Volumes
WRITE_BYTES_MAX = 64  # of one observed write: a background commit may take a file in the middle

Files = dict[str, bytes]
Step = dict[str, bytes | None]  # by path; None: deleted


class VolumeError(RuntimeError):
    """What the fake raises where Modal raises a RuntimeError."""


@dataclass(frozen=True, slots=True)
class CommitFault:
    """How one commit goes: after `delay_s` of the clock it fails with `error`, or doesn't (None).

    `takes_effect`: it has committed when it fails, as when the reply is lost.
    """

    delay_s: float = 0.0
    error: str | None = None
    takes_effect: bool = False


class FakeVolume:
    """The committed files, and the hosts that mount them. Thread-safe."""

    def __init__(self, root: Path, *, clock: Clock | None = None, seed: int = 0) -> None:
        self.clock = clock or SystemClock()
        self.random = Random(seed)
        self.lock = threading.RLock()
        self.committing = 0
        self._root = root
        self._files: Files = {}
        self._deleted: Files = {}

    def host(self, name: str) -> FakeMount:
        """Mount the Volume, as committed, at a folder of its own."""
        return FakeMount(self, self._root / name)

    def files(self) -> Mapping[str, bytes]:
        """Return what is committed, by path."""
        with self.lock:
            return dict(self._files)

    def apply(self, step: Step) -> None:
        """Commit changes; whole files, the last one wins."""
        with self.lock:
            for path, data in step.items():
                if data is not None:
                    self._files[path] = data
                elif path in self._files:
                    self._deleted[path] = self._files.pop(path)

    def resurrect(self) -> list[str]:
        """Bring deleted files back, as they were; returns their paths. Newer ones of the same name
        stay.
        """
        with self.lock:
            back = sorted(self._deleted.keys() - self._files.keys())
            self._files |= {path: self._deleted[path] for path in back}
            self._deleted.clear()
            return back


class FakeMount:
    """One host's view of a FakeVolume; `commit` and `reload` are those of its handle.

    `reload_s` is how long a reload shows an empty folder, by the clock. `commits` counts those that
    began, `committers_max` how many there were at once.
    """

    def __init__(self, volume: FakeVolume, folder: Path) -> None:
        self.folder = folder
        self.reload_s = 0.0
        self.commits = 0
        self.committers_max = 0
        self._volume = volume
        self._faults: deque[CommitFault] = deque()
        self._steps: list[Step] = []
        self._seen: Files = {}
        self._handle = threading.Lock()
        self._reloading = False
        self._committing = 0
        self._held_open = 0
        self._alive = True
        folder.mkdir(parents=True)
        self._fill()

    @property
    def calls(self) -> DiskCalls:
        """System calls that take a step each, for `local_store.segment_files`."""

        def write(descriptor: int, data: memoryview) -> int:
            return os.write(descriptor, data[:WRITE_BYTES_MAX])

        def observed(call: Callable[..., Any]) -> Callable[..., Any]:
            def observing(*args: Any, **kwargs: Any) -> Any:
                result = call(*args, **kwargs)
                self.observe()
                return result

            return observing

        return DiskCalls(
            open=observed(os.open),
            mkdir=observed(os.mkdir),
            write=observed(write),
            rename=observed(os.rename),
            unlink=observed(os.unlink),
        )

    @property
    def steps(self) -> int:
        """How many observed steps a background commit can choose from."""
        return len(self._steps)

    def observe(self) -> None:
        """Take what changed since the last look as one step."""
        with self._volume.lock:
            self._check_alive()
            step = self._difference()
            if step:
                self._steps.append(step)

    def faults(self, *faults: CommitFault) -> None:
        """Say how the next commits of this host go, in order; those after them go well."""
        self._faults.extend(faults)

    def commit(self) -> None:
        """Commit what is on the mount when it begins, then reload. Raises VolumeError.

        As with Modal's handle, a second call waits for the first.
        """
        with self._volume.lock:
            self._check_alive()
            if self._volume.committing >= COMMITTERS_MAX:
                raise VolumeError(f"more than {COMMITTERS_MAX} commits at once")
            self._count(+1)
        try:
            with self._handle:
                self._commit()
                self._reload()
        finally:
            with self._volume.lock:
                self._count(-1)

    def _commit(self) -> None:
        with self._volume.lock:
            self.observe()
            steps, self._steps = self._steps, []
            fault = self._faults.popleft() if self._faults else CommitFault()
        self._volume.clock.sleep(fault.delay_s)
        with self._volume.lock:
            self._check_alive()
            if fault.error is None or fault.takes_effect:
                self._apply(steps)
            else:
                self._steps = steps + self._steps
        if fault.error is not None:
            raise VolumeError(fault.error)

    def background_commit(self, prefix: int | None = None) -> int:
        """Commit the first `prefix` steps since the last commit, by seed if None; returns how many.

        Nothing is reloaded, and open files don't matter.
        """
        with self._volume.lock:
            self._check_alive()
            unordered = [{path: data} for path, data in sorted(self._difference().items())]
            self._volume.random.shuffle(unordered)
            self._steps += unordered
            if prefix is None:
                prefix = self._volume.random.randint(0, len(self._steps))
            self._apply(self._steps[:prefix])
            del self._steps[:prefix]
            return prefix

    def reload(self) -> None:
        """Show what is committed. Raises VolumeError while something is open on the mount.

        Changes that aren't committed yet are committed or lost, by seed.
        """
        with self._handle:
            self._reload()

    def _reload(self) -> None:
        hidden = self.folder.with_name(f".{self.folder.name}")
        with self._volume.lock:
            self._check_alive()
            if self._held_open or _open_below(self.folder):
                raise VolumeError("there are open files preventing the operation")
            self.observe()
            if self._steps and self._volume.random.random() < 0.5:
                self._apply(self._steps)
            self._steps = []
            self.folder.rename(hidden)
            self.folder.mkdir()
            self._reloading = True
        self._volume.clock.sleep(self.reload_s)
        with self._volume.lock:
            self._reloading = False
            if self._alive:
                shutil.rmtree(self.folder)
                hidden.rename(self.folder)
                self._fill()
            else:
                shutil.rmtree(hidden)

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Be another process of this host that has a file open on the mount."""
        self._held_open += 1
        try:
            yield
        finally:
            self._held_open -= 1

    def die(self) -> None:
        """End the host: its mount is gone, with everything that wasn't committed."""
        with self._volume.lock:
            self._alive = False
            shutil.rmtree(self.folder, ignore_errors=True)

    def _count(self, change: int) -> None:
        self._volume.committing += change
        self._committing += change
        self.commits += change > 0
        self.committers_max = max(self.committers_max, self._committing)

    def _apply(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._volume.apply(step)

    def _check_alive(self) -> None:
        if not self._alive:
            raise VolumeError("this host is dead")

    def _difference(self) -> Step:
        """Return what changed since the last look, and remember it as seen."""
        if self._reloading:
            return {}  # the folder only looks empty
        there = _contents(self.folder)
        step: Step = {path: None for path in self._seen.keys() - there.keys()}
        step |= {path: data for path, data in there.items() if self._seen.get(path) != data}
        self._seen = there
        return step

    def _fill(self) -> None:
        """Make the folder what is committed."""
        files = self._volume.files()
        for path in self._seen.keys() - files.keys():
            (self.folder / path).unlink()
        for path, data in files.items():
            if self._seen.get(path) != data:
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / path).write_bytes(data)
        self._seen = dict(files)


def _contents(folder: Path) -> Files:
    """Return each file's content, by path."""
    found: Files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                continue
            with suppress(FileNotFoundError), open(path, "rb") as file:  # renamed meanwhile
                found[os.path.relpath(path, folder)] = file.read()
    return found


def _open_below(folder: Path) -> bool:
    """Tell whether this process has a file, folder or its working directory open there."""
    inside = os.path.realpath(folder)
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    for link in [*links, "/proc/self/cwd"]:
        try:
            path = os.readlink(link)
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
        if path == inside or path.startswith(inside + os.sep):
            return True
    return False
