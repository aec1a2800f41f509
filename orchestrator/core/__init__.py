"""What is known and what is decided: no await, no clock, no I/O."""
