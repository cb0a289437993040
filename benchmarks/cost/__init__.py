"""What things cost: FLOPs, bytes, memory, compilation and time."""
