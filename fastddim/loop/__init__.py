"""The loop: ``DDIM``, its options, and what happens between two steps."""
