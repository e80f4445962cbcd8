"""A run: its settings, its folder, what it shows, its processes, and where it happened."""
