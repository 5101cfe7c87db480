"""Loads other people's networks from checkpoints."""
