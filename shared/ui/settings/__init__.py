"""The tab Settings."""
