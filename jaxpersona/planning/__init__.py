"""Predict memory and speed of a model on a device, by arithmetic and AOT compilation."""
