"""Many devices against one, in every mode of JAX."""
