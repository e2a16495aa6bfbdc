"""Parent watchdog: end the engine core when its server has ended, and never before.

Without its server no request could be ended and no expert revoked. vLLM's own worker processes follow the engine
core; the engine core itself follows no process.
"""

import multiprocessing
import os
import signal
import threading


def leave_interrupts_to_the_server() -> None:
    """Ignore Ctrl-C, which a terminal sends to all processes: the server drains, and ends this one after that.

    vLLM's engine core and its workers would end at once. Call it when they have set what they do at signals.
    """
    if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_parent() -> None:
    """Kill this process as soon as the one that started it is gone; only where multiprocessing started it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="flexgate-parent-watchdog", daemon=True).start()
