"""What every run needs and no paper mentions. Nothing here has to be read to follow a step."""
