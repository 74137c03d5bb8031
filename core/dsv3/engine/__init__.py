"""Generation: the model as a library object, its cache, its text, and the batched loop."""
