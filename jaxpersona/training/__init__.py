"""Training of directions by gradient descent through the frozen model."""
