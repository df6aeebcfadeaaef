"""A CUDA card that is not there, for driving the whole program at full size: see `card`, `holes` and `drive`.

`drive.begin` changes torch and the program for good: call it in a process of its own.
"""
