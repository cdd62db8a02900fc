"""The configuration: its schema, the tables in it, the rules between keys, and the way from a file to one valid `Config`."""
