"""A ladder of matrix products."""
