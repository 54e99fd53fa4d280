"""From files and words to arrays of fixed shape: numpy and Pillow, never JAX."""
