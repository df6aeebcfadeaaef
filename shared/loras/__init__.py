"""LoRA files of every trainer, read into one form and applied to a model that stays as it is.

names, layout, peft, verdict, multipliers, presets and library need no torch; adapters, reader, apply and
convert do.
"""
