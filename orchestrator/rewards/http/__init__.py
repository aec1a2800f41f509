"""Rewards that are servers."""
