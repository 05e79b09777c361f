"""ONNX: models as graphs, for servers, browsers and phones."""
