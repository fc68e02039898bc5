"""Arithmetic of an edit: a reference, its kernels, and one function to call them by."""
