"""Regions of a picture: where each concept is asked for, and how attention listens to it."""
