"""The embedded model organism: its world, corpus, judge, training and evaluation."""
