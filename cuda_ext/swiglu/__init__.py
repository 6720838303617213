"""The gated feed-forward nonlinearity."""
