"""Benchmarks, one script per claim; each prints model, dtype, threads, commit, memory bandwidth and load."""
