"""The training of the model and the classifier that ship."""
