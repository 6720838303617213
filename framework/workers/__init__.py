"""The roles of RLHF as plain classes: each owns one engine or generator, and knows no Ray."""
