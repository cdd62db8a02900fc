"""What the commands at the top of the repository share."""
