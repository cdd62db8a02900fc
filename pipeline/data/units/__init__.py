"""Units of preference data: rows that are compared with each other, read, checked, counted and stored."""
