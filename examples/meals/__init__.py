"""Meals that are delivered: a project of three views and four models over two sources."""
