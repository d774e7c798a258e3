"""Networks that predict: tensors in, tensor out."""
