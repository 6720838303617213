"""A token from logits by one uniform."""
