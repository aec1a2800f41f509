"""Curriculum learning: sources whose weights change with the training step. README.md tells how."""
