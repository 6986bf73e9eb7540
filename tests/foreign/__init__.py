import mlomae  # noqa: F401  mends an import that timm and transformers need
