"""F1: what every room may use: records, errors, registry, random numbers, runtime. Imports nothing at import time."""
