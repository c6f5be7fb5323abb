"""Frozen teachers: computed live, or replayed from a cache."""
