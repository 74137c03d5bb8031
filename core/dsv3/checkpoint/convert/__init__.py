"""Turning one checkpoint into another: cast, quantise, change of layout. One tensor at a time, resumable, never half-written."""
