"""The command line: `python -m experiments.torchcfm_table`."""

from experiments.torchcfm_table import table

if __name__ == "__main__":
    table.main()
