"""Measured costs: the database, what of it still holds, and the command that measures."""
