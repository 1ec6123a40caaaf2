"""Jacobi decoding: blocks of tokens solved by fixed-point iteration, token for token equal to greedy decoding."""
