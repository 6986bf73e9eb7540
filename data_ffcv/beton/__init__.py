"""The ``.beton`` format: its layout, what a file holds, verification, contact sheets."""
