"""Checkpoints: found, validated and read one tensor at a time. Everything but `loader` works without torch."""
