"""The scores that benchmarks publish, each equal to its reference implementation."""
