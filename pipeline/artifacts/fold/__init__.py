"""The fold: adapters become part of the weights of a base model, or are taken out of them again."""
