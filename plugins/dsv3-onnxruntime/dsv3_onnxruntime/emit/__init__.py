"""The arithmetic as ONNX nodes. Functions take a `Graph` and names of float32 values unless they say otherwise."""
