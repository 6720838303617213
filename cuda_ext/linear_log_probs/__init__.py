"""Log-probabilities of labels straight from hidden states."""
