"""What every run needs and no paper mentions. A training step can be read without it."""
