"""Parts of benchmarks/run.py: the work, the rivals, the processes that do it."""
