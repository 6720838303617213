"""By this folder NVIDIA's is known."""
