"""Ctrl-C between two steps."""
import signal
import threading


class Interrupt:
    """Context: Ctrl-C sets `asked` instead of raising, so that a step is never left half done.

    A second Ctrl-C raises. Only the main thread gets signals; elsewhere this does nothing."""
    asked = False

    def __enter__(self):
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
