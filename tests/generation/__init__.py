"""Mirrors framework/generation."""
