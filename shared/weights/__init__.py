"""Checkpoint files in every format that is read: headers, layouts, quantized layers, downloads."""
