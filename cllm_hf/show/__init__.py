"""How trajectories are looked at, in a terminal and as PNG."""
