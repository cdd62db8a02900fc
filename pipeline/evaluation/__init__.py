"""How adapters do beside their base on rows that were trained on and rows that were not, and how much of it may be chance."""
