"""What adapters of HTTP servers share."""
