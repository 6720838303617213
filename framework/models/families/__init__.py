"""How each family of published models writes our architecture down: names of tensors, keys of config.json."""
