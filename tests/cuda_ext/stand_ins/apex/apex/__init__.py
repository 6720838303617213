"""NVIDIA apex: a stand-in with the signatures of its main branch, computed in plain torch."""
