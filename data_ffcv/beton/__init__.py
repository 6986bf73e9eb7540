"""The .beton format: layout, tables, checks."""
