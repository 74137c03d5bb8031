"""Error budgets: how far a kernel may be from float64, per operator and numerics class."""
