"""What pages and cards are made of: templates, and matplotlib's figures as elements of them."""
