"""How data is prepared once: in several processes, kept as it comes, found again by the content of its files."""
