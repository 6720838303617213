"""F3: what a run will need, before it starts."""
