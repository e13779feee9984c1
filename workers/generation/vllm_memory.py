"""Memory that a reload of weights frees goes back to the system at once.

glibc keeps freed blocks of up to 32 MiB in its heap once the first of that size has been freed: after some reloads a
worker would hold as much again as its largest layers, in holes that fit nothing else. Blocks from `LARGE` on are mapped
apart while weights are loaded, and unmapped when they are freed. While tokens are generated the heap is the faster.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

LARGE = 1 << 20
AT_START = {"MALLOC_MMAP_THRESHOLD_": str(LARGE), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment of a worker, so that the first load is as the reloads are. New memory in huge pages where the system has
them: else the faults of every reload's fresh pages take a third of its time."""

_LARGEST = 32 << 20
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""As malloc.h numbers them. The second is otherwise twice the first."""


@contextmanager
def mapped_apart() -> Iterator[None]:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library, or none of our business
        yield
        return
    mallopt(_MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
