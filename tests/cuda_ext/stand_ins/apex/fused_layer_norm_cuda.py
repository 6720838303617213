"""The extension behind apex's norms."""
