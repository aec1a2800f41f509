"""Programs and schedules to start from; not part of the installed package."""
