"""Who may use the device meanwhile: threads side by side, or one that captures a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceUse:
    """Shared by threads that use the device; exclusive to one for which the others must hold still.

    A capture takes the default random generator of the device along, and while it is looked at whether a step waits for
    the device, torch lets nobody wait: a reward that draws or waits in another thread would break either, or be broken.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._taken = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While it lasts nobody has the device alone; waits for one who has."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self, timeout: float) -> Iterator[bool]:
        """Waits until the others are done, those who come keep waiting meanwhile; False: they were not in time."""
        with self._changed:
            until = self._changed.wait_for(lambda: not self._taken, timeout)
            self._taken = self._taken or until
            alone = until and self._changed.wait_for(lambda: not self._users, timeout)
            if until and not alone:
                self._taken = False
                self._changed.notify_all()
        try:
            yield alone
        finally:
            if alone:
                with self._changed:
                    self._taken = False
                    self._changed.notify_all()


DEVICE = DeviceUse()  # one, as the device's generator and torch's modes are the process's
