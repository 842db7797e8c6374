"""Device code: what Triton compiles. Nothing here validates."""
