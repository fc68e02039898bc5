"""Train directions by gradient descent through a frozen model."""
