"""The C library's memory allocator, which decides much of a CPU's speed on large tensors."""

import ctypes
import os
import sys

# Values of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next tensor; False where the C library or the environment forbids it.
    Otherwise the system maps and clears the pages of every large activation again, up to half the time of a step."""
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    return all([mallopt(M_MMAP_THRESHOLD, 2**30), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)])
