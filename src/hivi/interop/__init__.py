"""One other library a file."""
