"""Where normalization cannot go: problems that no contest of supervised batches can hold."""
