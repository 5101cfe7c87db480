"""One file for each system replaced. They translate its names and its schedule, no more."""
