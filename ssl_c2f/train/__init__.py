"""Training: the options of a run, the loop, the training state, validation, weights in and out."""
