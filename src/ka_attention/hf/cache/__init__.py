"""Caches of K and U for transformers."""
