"""Pictures on disk: saving them whole, and the metadata they carry."""
