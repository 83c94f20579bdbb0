"""Parts of benchmarks/run.py: the work, the rivals, and the processes that do the work."""
