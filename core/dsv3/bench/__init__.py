"""Measurements of what dsv3 itself costs. Figures name the machine they come from."""
