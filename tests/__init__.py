"""Mirrors the source, file by file; beside it the architecture, the recipes, faults and the whole from end to end."""
