"""From a prompt to a finished group."""
