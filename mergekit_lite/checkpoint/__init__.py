"""Tensors in: files, folders and Hub models as something one can ask for one tensor."""
