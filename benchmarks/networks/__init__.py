"""The networks that are trained, plain or normalized."""
