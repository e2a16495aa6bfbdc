"""Print what of a lock one package needs, with its hashes: ``python closure.py LOCK PACKAGE …``.

The lock says in a comment below each pin what asks for it (``# via``), as `make lock` writes it.
"""

import re
import sys
from pathlib import Path

PIN = re.compile(r"^([a-z0-9-]+)==.*\n(?: {4}.*\n)*", re.MULTILINE)


def closure(lock: str, wanted: set[str]) -> str:
    """The pins of the packages that are wanted and of everything that they ask for, directly or not.

    Raises:
        KeyError: the lock does not have a package that is wanted.
    """
    pins = {pin[1]: pin[0] for pin in PIN.finditer(lock)}
    if unknown := wanted - pins.keys():
        raise KeyError(f"the lock has no {', '.join(sorted(unknown))}")
    asked = {name: set(re.split(r", *", pin.partition("# via ")[2].strip())) for name, pin in pins.items()}
    needed: set[str] = set()
    while wanted - needed:
        needed |= wanted
        wanted = {name for name, by in asked.items() if by & needed}
    return "".join(pin for name, pin in pins.items() if name in needed)


if __name__ == "__main__":
    sys.stdout.write(closure(Path(sys.argv[1]).read_text(), set(sys.argv[2:])))
