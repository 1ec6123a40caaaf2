"""Consistency training: teach a model to reach the fixed point of a block from any of its states."""
