"""The nodes of a run: how their processes meet, and what they say of themselves to each other."""
