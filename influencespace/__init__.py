import os

__version__ = "0.1.0"

# Threads that wait for each other sleep instead of spinning. With spinning, a training on two threads of a busy machine took
# three times as long as on one. OpenMP reads it when it is loaded, so it is set before torch is; workers inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
