"""TorchCFM's two-dimensional table: `table` makes it, by the `methods`, beside the `peer`."""
