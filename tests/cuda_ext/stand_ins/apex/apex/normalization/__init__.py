"""Its norms."""
