"""What is read off the activations, as reductions inside the program."""
