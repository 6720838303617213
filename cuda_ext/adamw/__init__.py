"""The AdamW update."""
