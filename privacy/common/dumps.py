"""No picture of this process' memory, which holds people's words, is left on a disk when it breaks down, or handed out.

Not covered: root, swap, hibernation; systems other than Linux where a limit is not kept to.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

PR_SET_DUMPABLE = 4


def forbid_dumps() -> None:
    """Of this process and of what it starts. A program that the kernel hands dumps to is asked to keep to the limit."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def hide_memory() -> None:
    """On Linux: no dump of this process is handed to any program, and no other one of its owner's reads its memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
