"""Named directions in activation space: vectors, axes and caps."""
