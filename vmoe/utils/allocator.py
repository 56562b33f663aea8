"""The C library's memory allocator, which decides much of a CPU's speed on large tensors."""

import ctypes
import os
import sys

# Values of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next tensor instead of giving it back to the system; whether it does.

    On a CPU every large activation is otherwise mapped and unmapped in each layer, and the system clears its pages each
    time: up to half the time of a step. Does nothing where the C library is not glibc, or its environment variables say
    otherwise.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_MMAP_THRESHOLD, 2**30), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)])
