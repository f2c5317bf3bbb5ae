"""What the experiments share: their command lines, methods, training, sampling and figures."""
