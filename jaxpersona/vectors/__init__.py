"""Named directions of the residual stream: vectors, axes and caps."""
