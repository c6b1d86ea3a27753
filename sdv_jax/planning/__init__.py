"""What a program costs, before it is run."""
