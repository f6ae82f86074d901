"""The Volume: a folder that survives the container once it was committed.

`commit` and `reload` come from outside (the one handle of a Modal Volume); with none of them the
folder is an ordinary one. What is known of Modal's and shapes this module:

- commit retries for minutes by itself, so callers wait for it with a timeout of their own;
- it reloads the folder when it has committed, and that fails while a file is open, and shows an
  empty folder meanwhile: nothing may be written during it;
- background commits go on beside it, at any moment: files are complete under their name, or absent.

So one thread touches the mount: it runs what the waiting callers want written, then one commit for
all of them. A caller whose file came too late for a commit waits for the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from local_store import forks

State = Literal["committed", "reloaded", "failed", "unknown"]
COMMIT_TIMEOUT_S = 20.0  # below the 25 s of a shutdown; a commit takes a second or so
ROUND_MAX = 256  # writers under one commit: as many as share one sync of the buffer

_OPEN_FILES_HINT = "a file or the working directory is open on the Volume; close it and try again"
_RETRY_HINT = "try again with a pause; the data are safe in the buffer meanwhile"


@dataclass(frozen=True, slots=True)
class VolumeResult:
    """What became of a commit or a reload.

    `committed`: what was in place before it began survives the container. `reloaded`: what others
    had committed before is seen. `failed`: don't count on it; Modal may have committed all the
    same. `unknown`: timed out, it is still running. `reason` and `hint` never repeat what others'
    errors say. `error` is the caller's own, if its write raised.
    """

    state: State
    reason: str = ""
    hint: str = ""
    error: BaseException | None = None


@dataclass(eq=False, slots=True)
class _Wish:
    """What one caller wants, and the answer it waits for."""

    kind: Literal["commit", "reload"]
    write: Callable[[], object] | None = None
    answered: threading.Event = field(default_factory=threading.Event)
    result: VolumeResult | None = None

    def answer(self, result: VolumeResult) -> None:
        self.result = result
        self.answered.set()


class Volume(forks.Forkable):
    """A folder with its commit and reload. Thread-safe; after a fork the child starts afresh.

    At most one call to the handle is under way, on a daemon thread that starts with the first one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        commit: Callable[[], object] | None = None,
        reload: Callable[[], object] | None = None,
        commit_timeout_s: float = COMMIT_TIMEOUT_S,
    ) -> None:
        self.folder = folder
        self._commit = commit
        self._reload = reload
        self._timeout_s = commit_timeout_s
        self.after_fork_in_child()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Start with nothing under way: the thread that worked is the parent's."""
        self._wanted = threading.Condition(threading.Lock())
        self._wishes: list[_Wish] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def is_plain(self) -> bool:
        """Tell whether this is an ordinary folder: a commit says nothing about the container."""
        return self._commit is None

    def commit(
        self, write: Callable[[], object] | None = None, *, timeout_s: float | None = None
    ) -> VolumeResult:
        """Run `write`, then commit; waits at most `timeout_s` (default: `commit_timeout_s`).

        Callers that arrive while a commit is under way share the next one. `committed` counts for
        what `write` did, and for every file that was complete before the call. `write` closes what
        it opens. It may still run after `unknown`, never after another answer. Never raises.
        """
        return self._wait_for(_Wish("commit", write), timeout_s)

    def reload(self, *, timeout_s: float | None = None) -> VolumeResult:
        """See what others committed. Fails while anything is open on the mount, and the folder
        looks empty until it has ended: for a process that has no writers. Never raises.
        """
        return self._wait_for(_Wish("reload"), timeout_s)

    def close(self) -> None:
        """Refuse further calls and let the thread end; doesn't wait for a commit under way."""
        with self._wanted:
            self._closed = True
            self._wanted.notify_all()

    def _wait_for(self, wish: _Wish, timeout_s: float | None) -> VolumeResult:
        with self._wanted:
            if self._closed:
                return VolumeResult("failed", "this Volume is closed")
            try:
                self._call_thread()
            except RuntimeError:  # no more threads, or the interpreter is going down
                return VolumeResult("failed", "no thread can be started", _RETRY_HINT)
            self._wishes.append(wish)
            self._wanted.notify_all()
        wish.answered.wait(self._timeout_s if timeout_s is None else timeout_s)
        with self._wanted:
            if wish.result is not None:
                return wish.result
            if wish in self._wishes:  # another call hangs: this one never began, and never will
                self._wishes.remove(wish)
                return VolumeResult("failed", f"the {wish.kind} before it still runs", _RETRY_HINT)
        return VolumeResult("unknown", f"the {wish.kind} hasn't ended in time", _RETRY_HINT)

    def _call_thread(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="syncer volume", daemon=True)
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        while wishes := self._next():
            if wishes[0].kind == "reload":
                _answer_all(wishes, _called(self._reload, "reload"))
            else:
                self._commit_for(wishes)

    def _next(self) -> list[_Wish]:
        """Wait for wishes and take those of one kind that came first; none once closed."""
        with self._wanted:
            while not self._wishes and not self._closed:
                self._wanted.wait()
            kind = self._wishes[0].kind if self._wishes else None
            taken = [wish for wish in self._wishes if wish.kind == kind][:ROUND_MAX]
            self._wishes = [wish for wish in self._wishes if wish not in taken]
            return taken

    def _commit_for(self, wishes: list[_Wish]) -> None:
        written: list[_Wish] = []
        for wish in wishes:
            try:
                if wish.write is not None:
                    wish.write()
                written.append(wish)
            except BaseException as error:  # one caller's disk error isn't the others'
                reason = f"the file wasn't written ({type(error).__name__})"
                wish.answer(VolumeResult("failed", reason, _RETRY_HINT, error))
        if written:  # all that is in place now is in this commit
            _answer_all(written, _called(self._commit, "commit"))


def _answer_all(wishes: list[_Wish], result: VolumeResult) -> None:
    for wish in wishes:
        wish.answer(result)


def _called(call: Callable[[], object] | None, what: Literal["commit", "reload"]) -> VolumeResult:
    """Call the handle; what it raises becomes a value, without its text: that may hold anything."""
    try:
        if call is not None:
            call()
    except BaseException as error:  # nobody may wait for ever, whatever went wrong
        # The words are Modal's, from its server; there is no class or code to go by.
        open_files = "open files" in str(error)
        hint = _OPEN_FILES_HINT if open_files else _RETRY_HINT
        return VolumeResult("failed", f"the {what} failed ({type(error).__name__})", hint)
    return VolumeResult("committed" if what == "commit" else "reloaded")
