"""The runs of the packages, one a file; each is imported in the process of its sink only."""
