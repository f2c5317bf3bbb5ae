"""TorchCFM's two-dimensional table: `table` makes it, on the `problems`, by the `methods`, beside the `peer`."""

from experiments.torchcfm_table.table import CONFIG, Config, run

__all__ = ["CONFIG", "Config", "run"]
