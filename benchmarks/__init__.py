"""Benchmarks: one file per task, competitors side by side in one run. `python -m benchmarks.run` runs them."""
