"""Benchmarks; installed as cwfast.benchmarks."""
