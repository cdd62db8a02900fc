"""What a stage is given to train: adapters by family, what they start from, weights set free."""
