"""Rows to experts and back."""
