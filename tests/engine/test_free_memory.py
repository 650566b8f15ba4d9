"""Free memory goes back to the machine."""

import resource
import subprocess
import sys

import pytest

from influencespace.engine.memory import KEPT

HOLES = """
import numpy as np
from influencespace.engine.attempts import attempt
from influencespace.engine.memory import free_bytes

def leave_holes():
    np.ones(3 * 2**20)[0]  # after a freed block of 24 MB such blocks lie in the heap
    held = []
    for _ in range(40):
        held += [np.ones(2 * 2**20), np.ones(100)]
    global small
    small = held[1::2]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * {page}

leave_holes()
before, kept = resident(), free_bytes()
attempt(int)
print(before - resident(), kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the C library of Linux")
def test_a_task_leaves_no_holes() -> None:
    """Small arrays that live on keep the heap from shrinking: the holes between them are given back."""
    code = HOLES.replace("{page}", str(resource.getpagesize()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    if not kept:
        pytest.skip("another C library")
    assert kept > KEPT
    assert given_back > KEPT
