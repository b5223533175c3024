"""The directive ``command-help``: what ``cwfast --help`` and the help of every subcommand print."""

import argparse
import functools

from docutils import nodes
from docutils.parsers.rst import Directive

from cwfast import cli


class CommandHelp(Directive):
    """A section for each subcommand."""

    def run(self) -> list[nodes.Node]:
        parser = cli._parser()
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
        sections: list[nodes.Node] = [_literal(parser)]
        for name, command in commands.items():
            section = nodes.section(ids=[f"cwfast-{name}"])
            section += [nodes.title(text=f"cwfast {name}"), _literal(command)]
            sections.append(section)
        return sections


def _literal(parser: argparse.ArgumentParser) -> nodes.literal_block:
    parser.formatter_class = functools.partial(argparse.HelpFormatter, width=90)  # what the page's column holds
    text = parser.format_help()
    return nodes.literal_block(text, text, language="text")
