"""The command line: `python -m experiments.torchcfm_table`."""

from experiments.lab.command_line import parse
from experiments.torchcfm_table import table

if __name__ == "__main__":
    table.run(parse(table.Config, table.CONFIG, table.__doc__))
