"""The embedded model organism: its ground truth, corpus, judge, training and evaluation."""
