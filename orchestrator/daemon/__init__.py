"""The whole: built, supervised, changed while it runs."""
