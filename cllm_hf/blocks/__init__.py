"""What all rooms say of a block, once: its rules, its packed layout, the forward passes over it, and their limits."""
