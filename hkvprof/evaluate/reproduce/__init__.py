"""Published experiments, run anew on the benchmarks' own files."""
