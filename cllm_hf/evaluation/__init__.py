"""Measuring what Jacobi decoding gains, and showing it."""
