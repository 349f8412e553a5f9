"""Another Python beside this one, for what this process cannot do itself."""

from __future__ import annotations

import sys


def python(code: str) -> list[str]:
    """The command that runs `code` with the modules that this process has, and never with those of the folder that somebody
    happens to be in, which `-c` would look for first."""
    found = [entry for entry in sys.path if entry]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {found!r}; {code}"]
