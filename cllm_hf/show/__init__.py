"""What there is to see: how blocks converge, and two ways of decoding side by side, in a terminal or on a page."""
