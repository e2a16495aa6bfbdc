"""An engine must not outlive its server: nobody could end its requests or withdraw its experts any more.

vLLM's own worker processes follow the engine core; the engine core follows nobody.
"""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Kill this process as soon as the one that started it is gone; only where multiprocessing started it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="flexgate-lifeline", daemon=True).start()
