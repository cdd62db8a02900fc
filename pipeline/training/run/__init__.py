"""A run: put together, stepped, recorded, stopped."""
