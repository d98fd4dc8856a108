"""Benchmarks: one script per claim. Each prints model, dtype, threads, commit, memory bandwidth and load with its result."""
