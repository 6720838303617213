"""NVIDIA apex: a stand-in with its signatures, computed in plain torch."""
