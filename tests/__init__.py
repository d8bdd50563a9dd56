"""Tests mirror the package. This file runs before any of them: threads wait as the command line makes them wait, and
there is one, because bit-identical results are promised for an equal number of threads only."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # both are read when torch loads
os.environ.setdefault("OMP_NUM_THREADS", "1")
