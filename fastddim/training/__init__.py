"""Trains the model and the classifier that ship."""
