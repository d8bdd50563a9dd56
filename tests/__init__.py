"""Tests mirror the package. This file runs before any of them: threads wait as the command line makes them wait."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads
