"""Predict whether a model fits a device: arithmetic and ahead-of-time compilation."""
