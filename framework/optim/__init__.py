"""F2: the optimizer and its schedule."""
