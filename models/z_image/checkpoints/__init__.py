"""The files of Z-Image's parts: which they are, what their names mean, and loading them."""
