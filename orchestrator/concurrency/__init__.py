"""Waking tasks, and processes for code that may hang."""
