"""The folder of the journals beside a records file, and the processes that use it.

It imports nothing of the store, for the supervisor imports it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

SEGMENT: Final = ".segment"  # the suffix of a journal's files, each locked while its owner lives


def journal_directory(path: str | os.PathLike[str]) -> str:
    """Return the folder of the journals of all processes that use the records file at `path`."""
    # Not "-journal": SQLite has a file of that name.
    return f"{os.path.realpath(path)}-requests"


def count_living(path: str | os.PathLike[str]) -> int:
    """Return how many processes live that serve requests with the records file at `path`."""
    found = Path(journal_directory(path)).glob(f"*{SEGMENT}")
    return len({each.name.partition("-")[0] for each in found if _is_locked(each)})


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # gone meanwhile, or another user's
        return False
    try:
        # Shared, for a moment: processes that count at once do not count each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
