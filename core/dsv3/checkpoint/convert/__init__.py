"""Turning one checkpoint into another: cast, quantise, change of layout. Resumable, and never half-written."""
