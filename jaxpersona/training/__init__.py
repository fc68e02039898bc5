"""Training of directions by gradient descent through a frozen model."""
