"""The command line: flags, tasks from files, and what start.py does."""
