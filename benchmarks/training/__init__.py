"""Ways to train: the methods, the runs of one on a problem, the search of a learning rate."""
