"""Example programs and schedules; not part of the installed package."""
