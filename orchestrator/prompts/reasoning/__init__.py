"""Prompts that are entries of a task of the package reasoning-gym."""
