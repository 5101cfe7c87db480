"""What the commands do, from Python: images by seed and in files, generation, measurement."""
