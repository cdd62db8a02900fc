"""What a run asks of a model beyond its cut, tried out on a tiny copy before a weight is read."""
