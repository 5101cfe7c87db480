"""The loop: ``DDIM``, its options, and its runs."""
