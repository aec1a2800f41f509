"""What each request asks for."""
