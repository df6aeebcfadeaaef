"""Beside the form: what runs, what waits, and the picture that came last."""
