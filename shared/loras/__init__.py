"""LoRA files of every trainer, read into one form and applied to a model that stays as it is.

names, parser, peft, inspection, strengths, presets and library need no torch; adapters, reader, apply and
convert do.
"""
