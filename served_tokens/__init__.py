import sys


def _told_in_one_line(kind, error, trace) -> None:
    """For sys.excepthook: a package that is not there, which is first met at some import of a script."""
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    print(
        f"{error}: activate the virtual environment (. .venv/bin/activate), or install what is missing into this one: "
        "python -m pip install -r requirements.txt",
        file=sys.stderr,
    )


sys.excepthook = _told_in_one_line
