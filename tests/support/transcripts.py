"""What a server printed from start to end, as an operator saw it, without what differs between runs."""

import fcntl
import json
import os
import re
import struct
import termios
import threading
from pathlib import Path

COLUMNS = 160
_STEP = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|[\r\n]|[^\x1b\r\n]+")


class Terminal:
    """A pseudo-terminal: give `slave` to one process as output, and `close` this when it has started."""

    def __init__(self, log: Path) -> None:
        self._master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
        self._log = log
        threading.Thread(target=self._copy, daemon=True).start()

    def close(self) -> None:
        """Leave the terminal to the process; its log ends when the process and its children do."""
        os.close(self.slave)

    def _copy(self) -> None:
        with self._log.open("wb", buffering=0) as file:
            try:
                while data := os.read(self._master, 65536):
                    file.write(data)
            except OSError:  # the last process that wrote here has ended
                os.close(self._master)


def screen(raw: str) -> list[str]:
    """The lines that a terminal shows of an output that returns to the start of lines, clears them and goes up."""
    lines, row, column = [""], 0, 0
    for step in _STEP.finditer(raw):
        text, count, command = step[0], int(step[1] or 1), step[2]
        if text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text == "\r":
            column = 0
        elif command == "A":
            row = max(0, row - count)
        elif command == "K":
            lines[row] = ""
        elif not text.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return lines


def transcript(log: Path) -> list[str]:
    """What was shown, but for requests: times, addresses, kernels and the model's folder are masked."""
    raw = log.read_bytes().decode()  # as it is: `read_text` makes line ends of returns
    shown = [masked for line in screen(raw) if (masked := _masked(line.rstrip()))]
    return [line for line in shown if not line.startswith(("info: request", "TIME info    request"))]


def _masked(line: str) -> str:
    if line.startswith("{"):
        entry = json.loads(line)
        return f"{entry['level']}: {entry['event']}"
    line = re.sub(r"^(\^C)?\d\d:\d\d:\d\d ", "TIME ", line)
    line = re.sub(r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:PORT", line)
    return re.sub(r"^(kernels +).*|^(model +)\S+", lambda found: f"{found[1] or found[2]}…", line)
