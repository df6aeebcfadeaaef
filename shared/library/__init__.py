"""The models on this computer: cards, catalog, what a job of one takes, downloads."""
