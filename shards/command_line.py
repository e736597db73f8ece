"""What the command lines of all commands share. Imports nothing heavy: --help must answer at once."""

import argparse
from pathlib import Path

import simclr_dali


class _Parser(argparse.ArgumentParser):
    """One whose usage names what must be given, and leaves the options to the list below it."""

    def format_help(self) -> str:
        self._shorten_usage()
        return super().format_help()

    def format_usage(self) -> str:
        self._shorten_usage()
        return super().format_usage()

    def _shorten_usage(self) -> None:
        needed = [action for action in self._actions if action.required or not action.option_strings]
        formatter = self._get_formatter()
        formatter.add_usage(None, needed, [], prefix="")
        words = " ".join(formatter.format_help().split()).replace("%", "%%")
        self.usage = f"{words} [OPTION ...]"


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that is called as the command was. Its help is ``doc``, with the options behind the examples.

    doc: a sentence, examples as an indented block, and the rest, as in the docstrings of commands.
    """
    about, _, rest = (doc or "").partition("\n\n")
    examples, _, rest = rest.partition("\n\n")
    if not examples.startswith("    "):
        examples, rest = "", f"{examples}\n\n{rest}"
    prog = f"simclr-dali {simclr_dali.command}" if simclr_dali.command else None
    parser = _Parser(
        prog=prog,
        description=f"{about.rstrip()}\n\nexamples:\n{examples.rstrip()}" if examples else about,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this text and leave.")
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
