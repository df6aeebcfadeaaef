"""What every part does with files. Standard library only."""
