"""Trajectory datasets: how blocks of a model's greedy responses converge under Jacobi iteration."""
