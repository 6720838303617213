"""F2: what a corpus holds, and what of it is worth training on."""
