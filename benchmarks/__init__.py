"""Measured comparisons: each runs another program and Millrace in one go and prints their ratio."""
