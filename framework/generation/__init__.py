"""F3: prompts in, rollouts out. `protocol` says what a generator is, `native` is ours; nothing is imported here."""
