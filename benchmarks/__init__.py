"""Microbenchmarks (pytest-benchmark) and benchmarks of whole runs; results lie in results/, by device."""
