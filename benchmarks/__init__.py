"""Micro-benchmarks of mapo_kernels and its peers."""
