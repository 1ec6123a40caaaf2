"""Benchmarks against published procedures, and of what an iteration of Jacobi decoding costs."""
