"""Claimed speeds, one file a number, each against its rival in the same run: `launch/bench` runs them.

They assert who computes the same thing, never how fast; docs/benchmarks.md says what came out, and on what.
"""
