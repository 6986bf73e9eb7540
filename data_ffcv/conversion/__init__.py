"""Writing .beton files."""
