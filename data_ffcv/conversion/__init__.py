"""Writing ``.beton`` files: which samples, how they are encoded, pages, temporary names."""
