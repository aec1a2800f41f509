"""The durable facts of a run, as a fold over records."""
