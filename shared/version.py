"""The version written into every image's metadata and shown on the page."""

VERSION = "0.1.0"
