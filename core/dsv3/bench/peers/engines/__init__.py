"""One file per engine. They are run as scripts by whatever Python has the engine, where dsv3 need not be installed: each
imports its engine and the standard library only (`run_dsv3` alone imports dsv3), and `main.py` runs them."""
