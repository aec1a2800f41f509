"""The share of every source at a step."""
