"""An adapter on disk: its files, keys and facts, and the maps of a weight that its families are."""
