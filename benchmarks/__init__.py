"""Scripts that measure; each prints its tables and writes a page under ``docs/benchmarks``."""
