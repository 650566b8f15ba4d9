import os

__version__ = "0.1.0"

# Threads that wait for each other sleep instead of spinning. With spinning, a training on two threads of a busy machine took
# several times as long as on one. OpenMP reads it when torch is loaded, which for the command line and the workers of its own
# Ray is after this. Where torch comes first, or on a cluster's nodes, the environment has to say it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
