"""The work of the commands, from Python: images by seed and in files, generation, measurement."""
