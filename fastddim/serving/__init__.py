"""Continuous batching: requests of different samplers share a batch whose slots are always full."""
