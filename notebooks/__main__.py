"""Executes the notebooks and writes their outputs: `python -m notebooks`, or some: `python -m notebooks 04 05`.

A notebook is edited as `NN_name.py`; its pair `NN_name.ipynb` is made here, with outputs, and never edited. Whatever is
written to stderr is an error: a reader should not have to wonder about a warning.

`--smoke` cuts trainings down to a few steps, compiles without optimising, and runs two at a time; `--output` leaves the
outputs of the repository alone.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
import tyro
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def execute(source: Path) -> nbformat.NotebookNode:
    """Runs a notebook from top to bottom in a fresh kernel, in its own folder.

    Args:
        source: the notebook, as Python in the percent format.

    Returns:
        The notebook with its outputs, and with nothing in it that would change from run to run by itself.

    Raises:
        CellExecutionError: what the notebook raised.
        RuntimeError: if it wrote to stderr.
    """
    notebook = read(source)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": FOLDER}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{source.name} wrote to stderr: {output['text']}")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def read(source: Path) -> nbformat.NotebookNode:
    """The cells of a notebook's source, without outputs, under names that are the same at the next reading."""
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
    return notebook


def main(names: tyro.conf.Positional[tuple[str, ...]] = (), *, smoke: bool = False, output: Path = FOLDER) -> None:
    """Executes notebooks.

    Args:
        names: how the wanted ones begin; by default all.
        smoke: cut trainings down to a few steps.
        output: the folder to write to.
    """
    if smoke and output.resolve() == FOLDER.resolve():
        raise SystemExit("--smoke needs an --output of its own: the repository keeps the outputs of whole runs.")
    os.environ["FM_JAX_SMOKE"] = str(int(smoke))
    if smoke:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    wanted = [source for source in SOURCES if not names or source.stem.startswith(names)]
    if not wanted:
        existing = ", ".join(source.stem for source in SOURCES)
        raise SystemExit(f"No notebook begins with {' or '.join(names)}; there are {existing}.")
    output.mkdir(parents=True, exist_ok=True)

    def write(source: Path) -> None:
        start = time.monotonic()
        try:
            notebook = execute(source)
        except Exception as error:
            error.add_note(f"in {source.name}")
            raise
        path = output / f"{source.stem}.ipynb"
        nbformat.write(notebook, path)
        seconds, size = time.monotonic() - start, path.stat().st_size / 1e3
        print(f"{source.stem:28}{seconds:6.1f} s {size:8.0f} kB", flush=True)

    with ThreadPoolExecutor(2 if smoke else 1) as pool:
        list(pool.map(write, wanted))  # which raises what a notebook did, and begins no other then


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
