"""The disk under a container: a kill leaves what was written, a power loss what was synced.

Of what was written since, a power loss leaves any part (syncer/testkit/power_loss.py). Each write
to the disk passes through Python for that, so only some histories have such a disk.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from syncer.testkit.power_loss import DiskRecorder
from tests.simulation.files import Image, image_of

POWER_LOSSES = 0.5  # of the crashes of a container with such a disk


class Disk:
    """Remembers what a folder's files would hold after a power loss."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._died_at = 0
        self.power_lost = False
        self._begin()

    def _begin(self) -> None:
        self._recorder = DiskRecorder(self._folder)
        self._recorder.__enter__()

    def close(self) -> None:
        """Stop watching."""
        self._recorder.__exit__(None, None, None)

    def image(self, dice: Random) -> Image:
        """Return what is there when the process ends now, by a kill or by a power loss."""
        self._died_at = len(self._recorder.events)
        there, self.power_lost = image_of(self._folder), dice.random() < POWER_LOSSES
        if not self.power_lost:
            return there
        _, left = self._recorder.after_power_loss(self._died_at, dice.getrandbits(32))
        watched = {event.file for event in self._recorder.events}
        for name, content in there.items():
            # What is written past SQLite is as it was once, or as it is: nobody syncs it.
            if name not in watched and (name not in left or dice.random() < 0.5):
                left[name] = content
        return left

    def risen(self) -> None:
        """Go on with what is there; what the dead process's handles did since is undone."""
        if self.power_lost:
            self.close()
            self._begin()
        else:
            del self._recorder.events[self._died_at :]
