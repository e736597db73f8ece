"""Names of classes and labels of samples, as people write them down."""

import codecs
import re
from collections.abc import Sequence
from pathlib import Path

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.sources.source import UNLABELLED
from simclr_dali.shards.wording import counted

CLASSES = "classes.txt"
# More classes than this, and ten times as many as there are different labels, and the labels are ids.
_MOST_CLASSES = 100_000
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_classes(path: Path) -> list[str]:
    """The names in a text file, one a line; editors' byte order marks, line ends and last blank lines are dropped.

    Raises UserError where the file is no UTF-8 or UTF-16 text, has a blank line between others (the numbers of those
    behind it would shift), a name twice, or none at all.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-16" if raw.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path} holds NUL characters, as UTF-16 without its mark does; save it as UTF-8")
    names = [line.strip() for line in re.split("\r\n|\n|\r", text.rstrip("\x1a"))]  # DOS ended texts with Ctrl-Z
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{path} is empty; write the name of a class on each line, the first is class 0")
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is blank; remove it, or name the class")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if first.setdefault(name, number) < number:
            raise UserError(f"{path} has {name!r} on lines {first[name]} and {number}; give each class its own name")
    return names


def labels_of_texts(texts: Sequence[str], names: list[str] | None, where: str) -> tuple[list[int], list[str]]:
    """Labels and names of classes from what the ``.cls`` members of a split hold.

    Numbers are places in ``names`` (or, without names, in a list of numbers). Other texts must be names themselves, and
    so must numbers where names are numbers, such as ids: they would mean something else as places. -1 everywhere means
    no labels. where: the split, for messages. Raises UserError where neither fits all.
    """
    different = set(texts)
    if different == {str(UNLABELLED)}:
        return [UNLABELLED] * len(texts), []
    numbers = {text: int(text) for text in different if re.fullmatch(r"\d{1,18}", text)}
    if names is not None:
        names_are_ids = any(name.isdecimal() for name in names) and names != [str(i) for i in range(len(names))]
        if not names_are_ids and len(numbers) == len(different) and max(numbers.values()) < len(names):
            return [numbers[text] for text in texts], names
        if different <= set(names):
            place = {name: number for number, name in enumerate(names)}
            return [place[text] for text in texts], names
        if names_are_ids:
            odd = min(different - set(names))
            raise UserError(f"{where}: a label is {odd[:40]!r}, which is no line of {CLASSES}; complete it")
        if len(numbers) == len(different):
            raise UserError(
                f"{where} names {counted(len(names), 'class', 'classes')}, but a picture has label "
                f"{max(numbers.values())}; complete {CLASSES}"
            )
    if len(numbers) < len(different):
        odd = min(different - numbers.keys())
        raise UserError(
            f"{where}: a label is {odd[:40]!r}, not the number of a class; write {CLASSES} beside the tars, with each "
            f"label on a line of its own"
        )
    count = 1 + max(numbers.values())
    if count > max(_MOST_CLASSES, 10 * len(different)):
        raise UserError(
            f"{where}: labels go up to {count - 1} with only {len(different)} different ones, as ids do; write "
            f"{CLASSES} beside the tars, with each label on a line of its own"
        )
    return [numbers[text] for text in texts], [str(number) for number in range(count)]
