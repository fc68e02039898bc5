"""The science on arrays and files: texts, rollouts, judging, role vectors, axis, projection."""
