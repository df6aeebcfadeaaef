"""The pictures that were made: search, trash, thumbnails, archives."""
