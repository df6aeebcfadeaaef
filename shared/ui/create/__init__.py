"""The tab Create: the form and what fills it."""
