"""The feature kernel, and the batch engine around it."""
