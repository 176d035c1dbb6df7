"""Models in plain PyTorch that know nothing of distribution: hidden states out, no loss."""
