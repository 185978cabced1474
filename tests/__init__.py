"""The tests; before torch is imported, one thread a process.

With `-n 2` on two cores, threads of OpenMP that wait for each other's turn take six times the processor time.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
