"""A trained model, or a cut of it, in the forms of other programs: ONNX, GGUF, static vectors."""
