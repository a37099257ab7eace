import sys


def _in_one_line(kind, error, trace) -> None:
    """For sys.excepthook: a package that is missing is met at some import of a script, and is told with the way out."""
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    way_out = "activate the virtual environment (. .venv/bin/activate), or python -m pip install -r requirements.txt"
    print(f"{error}: {way_out}", file=sys.stderr)


sys.excepthook = _in_one_line
