"""The contest: every method on every problem, tuned alike, each run kept; and its report."""
