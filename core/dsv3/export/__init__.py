"""ONNX: operators as models in standard operators, test vectors for vendors, and whole models as graphs.

`opmodel.op_model` one operator, `vectors.write_vector` its test vectors, `run_vectors` and `compare` the chain that proves
an implementation, `model.export_onnx` a checkpoint. Nothing here imports onnx or torch before it is used.
"""
