"""Rewards that come with the daemon: comparisons with the label, and the judgements of packages."""
