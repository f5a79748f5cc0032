"""Benchmarks: each prints ratios that were taken in one run, and says how."""
