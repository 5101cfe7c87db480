"""Networks from the files people have."""
