"""What quantisation can learn from a text: which channels are outliers, and which rounding errors cancel.

The model runs over the text one layer at a time, from the checkpoint, in float32: `sweep`. What is done with each layer's
weights and inputs is a visitor's business: `migrate` moves outlier channels into the weights, `compensate` rounds to INT4.
"""
