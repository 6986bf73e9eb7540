import mlomae  # noqa: F401  fixes an import that timm and transformers need
