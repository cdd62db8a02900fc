"""What is trained in a stage: the families of adapters, and modules of the model itself."""
