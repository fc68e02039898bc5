"""Predict a model's memory and speed on a device, by arithmetic and AOT compilation."""
