"""What the tests share: oracles, networks to train, and what is checked of each."""
