"""What a model is made of: building it without weights, finding its parts, standing in for those of other stages."""
