"""`scalecryo help`: a verb in short, a group of settings, or the words used."""

import textwrap
import typing
from collections.abc import Sequence
from dataclasses import fields

from scalecryo.commands.console import say
from scalecryo.commands.examples import EXAMPLES
from scalecryo.commands.glossary import TERMS
from scalecryo.commands.setting_options import COMMON
from scalecryo.config import SECTIONS, SETTINGS
from scalecryo.errors import UsageError
from scalecryo.settings import RECIPES

WIDTH = 110


def run(topic: str) -> None:
    """Print what a topic is.

    Raises:
        UsageError: there is no such topic.
    """
    if topic == "terms":
        lines = [_entry(term, text, 20) for term, text in TERMS.items()]
    elif topic == "train":
        lines = ["What people set (scalecryo train --help lists everything):", ""]
        lines += [_setting(name, f"--{SETTINGS[name].name.replace('_', '-')}") for name in COMMON]
        lines += ["", "Recipes:", "", *(_entry(name, how, 14) for name, how in RECIPES.items())]
        lines += ["", "Groups of settings, scalecryo help GROUP:", ""]
        lines += [_entry(name, (kind.__doc__ or "").splitlines()[0], 14) for name, kind in SECTIONS.items()]
        lines += ["", *_examples(topic)]
    elif topic in SECTIONS:
        lines = [SECTIONS[topic].__doc__ or "", ""]
        lines += [_setting(f"{topic}.{field.name}", f"--{topic}.{field.name}") for field in fields(SECTIONS[topic])]
    elif topic in EXAMPLES:
        lines = [*_examples(topic), "", f"Options: scalecryo {topic} --help"]
    else:
        known = ", ".join(["terms", *EXAMPLES, *SECTIONS])
        raise UsageError(f"help {topic}: no such topic: there are {known}")
    for line in lines:
        say(line)


def _examples(verb: str) -> list[str]:
    lines = ["Examples:", ""]
    for what, command in EXAMPLES[verb]:
        lines += [f"  # {what}", f"  scalecryo {command}"]
    return lines


def _setting(name: str, flag: str) -> str:
    """One setting: its flag, what it takes, its help, default and recipes."""
    field = SETTINGS[name]
    readers: Sequence[str] = field.metadata["recipes"]
    choices = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
    kind = "|".join(choices) if choices else getattr(field.type, "__name__", "list")
    default = "" if field.default in ("", ()) else f"; default {str(field.default).lower()}"
    only = "" if len(readers) == len(RECIPES) else f"; read by {', '.join(readers)}"
    return _entry(f"{flag} {kind}", f"{field.metadata['help']}{default}{only}", 38)


def _entry(name: str, text: str, width: int) -> str:
    """A word and its meaning, indented under each other."""
    head = f"  {name}".ljust(width)
    indent = " " * width
    if len(f"  {name}") >= width:
        return "\n".join([f"  {name}", textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)])
    return textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=indent)
