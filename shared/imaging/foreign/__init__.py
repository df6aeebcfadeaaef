"""What other programs write into their pictures, read as settings."""
