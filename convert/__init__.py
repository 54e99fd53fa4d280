"""PyTorch weights to model directories and back. Nothing else in the library imports this."""
