"""Batch and live inference: the champion model, live input, live predictions."""
