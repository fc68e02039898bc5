"""Estimates of a model's memory and speed on given chips, by arithmetic and AOT compilation."""
