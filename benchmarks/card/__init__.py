"""The checks of benchmarks/gpu.py, by what they look at."""
