"""Data: files → documents → tokens → chunks (`store`) → rows (`split`, `mixture`) → micro-batches; and the preview."""
