"""What the command lines of all commands share. Imports nothing heavy: --help must answer at once."""

import argparse
from pathlib import Path

import simclr_dali


def parser_of(about: str, doc: str | None = None) -> argparse.ArgumentParser:
    """A parser that is called as the command was, and whose help ends with ``doc`` as it stands."""
    prog = f"simclr-dali {simclr_dali.command}" if simclr_dali.command else None
    parser = argparse.ArgumentParser(
        prog=prog, description=about, epilog=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Given by the deepspeed launcher to whatever it starts; shards.launch reads the environment instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def seed(text: str) -> int:
    """The type of an argument that seeds what is drawn."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{number} is not in 0 .. 2^63-1")
    return number


def positive_int(text: str) -> int:
    """The type of an argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def positive_number(text: str) -> float:
    """The type of an argument that is a finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def file_to_write(text: str) -> Path:
    """The type of an argument that names a file which is written at the end of long work."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}; make it first")
    return path
