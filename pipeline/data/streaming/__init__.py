"""Data that is read as it is trained on, window after window, and not kept."""
