"""Options as they were called before: taken as ever, told nowhere.

An option name now means one thing in all commands, and a family is always the first argument. Scripts that were written
before go on working.
"""

from __future__ import annotations

from collections.abc import Sequence

_PLANS = {"--batch": "--plan-batch", "--target": "--plan-target"}
_OLD = {
    "compile": _PLANS,
    "quantize": {**_PLANS, "--format": "--precision"},
    "distill": {"--batch": "--batch-size"},
    "cascade": {"--json": "--json-file"},
    "serve-ray": {"--target": "--target-requests"},
    "inspect": {"--bisect": "--fails-on"},
}
_FAMILY = "--engines"  # now an argument of these
_TAKE_A_FAMILY = ("validate", "refit", "frontier", "cascade")


def in_todays_words(arguments: Sequence[str]) -> list[str]:
    """Rewrites a command line that says things as they were said before.

    >>> in_todays_words(["validate", "--engines", "engines/digits", "--degrees", "8"])
    ['validate', 'engines/digits', '--degrees', '8']
    >>> in_todays_words(["compile", "--batch=1:4:8"])
    ['compile', '--plan-batch=1:4:8']
    """
    if not arguments:
        return []
    command, *rest = arguments
    families, words = [], []
    waiting = False  # for the family that stands behind --engines
    for word in rest:
        name, equals, value = word.partition("=")
        if waiting:
            families.append(word)
            waiting = False
        elif command in _TAKE_A_FAMILY and name == _FAMILY:
            families += [value] if equals else []
            waiting = not equals
        else:
            words.append(_OLD.get(command, {}).get(name, name) + equals + value)
    return [command, *families[-1:], *words, *([_FAMILY] if waiting else [])]
