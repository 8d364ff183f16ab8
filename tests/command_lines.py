"""Command lines and config keys as people read them, in messages and pages: do they exist?"""

import dataclasses
import fnmatch
import functools
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
from unittest import mock

import concat_jax
import data_pipelines
from concat_jax.core import cli
from concat_jax.core import config as configuration

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = (concat_jax, data_pipelines)
# Values of `arg` in --config=FILE:arg that give a config other sections.
ARGUMENTS = ("", "mini", "smoke", "attributes")
PLACEHOLDERS = {"--name"}
# Of Scenic's launcher, whose own parser this is not, pages name the flags of ours.
SCENIC_MAIN = "concat_jax.scenic_main"


@functools.cache
def commands():
    """Command's module -> name of a flag -> what parses its values."""
    found = {}
    for package in PACKAGES:
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            spec = importlib.util.find_spec(info.name)
            source = pathlib.Path(spec.origin).read_text("utf-8")
            if info.ispkg or not re.search(r"cli\.(command|main)\(", source):
                continue
            module = importlib.import_module(info.name)
            flags = cli.Flags()
            if hasattr(module, "define_flags"):
                module.define_flags(flags)
            found[info.name] = {name: flags[name].parser for name in flags}
            if "with_config=True" in inspect.getsource(module):
                found[info.name] |= dict.fromkeys(("config", "workdir", "distributed"))
    return found | {SCENIC_MAIN: dict.fromkeys(("config", "workdir"))}


@functools.cache
def config_keys():
    """Every dotted key of the configs, the sections between included, and fields of dataclasses."""
    keys = set()
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem == "__init__":
            continue
        module = importlib.import_module(f"configs.{path.stem}")
        for argument in ARGUMENTS:
            try:
                config = module.get_config(argument)
            except ValueError:
                continue
            for key in configuration.flat(config):
                parts = key.split(".")
                keys |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    return keys


@functools.cache
def fields():
    """Names of the fields of all the product's dataclasses and functions' parameters."""
    names = set()
    for package in PACKAGES:
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for value in vars(module).values():
                if dataclasses.is_dataclass(value):
                    names |= {field.name for field in dataclasses.fields(value)}
    return names


def is_known_key(key):
    """Whether `key`, which may hold *, is a key of some config, or a field below a section."""
    if any(fnmatch.fnmatchcase(known, key) for known in config_keys()):
        return True
    section, _, name = key.rpartition(".")
    is_section = any(fnmatch.fnmatchcase(known, section) for known in config_keys())
    return is_section and name in fields()


def commands_in(text):
    """(module, the words after it up to the end of the command) of every command in a message."""
    for match in re.finditer(r"python -m ([\w.]*\w)((?: (?!`)[^`;,)]*)?)", text):
        yield match[1], match[2]


def flags_in(text):
    return {f"--{name}" for name in re.findall(r"(?<![\w-])--([a-z][\w]*)", text)} - PLACEHOLDERS


def is_flag(flag, module):
    return flag[2:] in commands()[module]


def takes(module, name, value):
    """Whether a command has a flag that takes a value."""
    parser = commands()[module].get(name)
    try:
        return parser is not None and parser.parse(value) is not None
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class Given:
    """A command line that its command's own parser took."""

    flags: cli.Flags
    arguments: list[str]


def parse(module, words):
    """What a command makes of the words behind its name; SystemExit with its sentence if nothing.

    The command itself is not run.
    """
    found = []

    def note(doc, define_flags, command, argv=None, *, arguments="", with_config=False, **settings):
        def record(given, rest):
            found.append(Given(given, rest))

        settings = dict(arguments=arguments or "ANY", with_config=with_config, computes=False)
        cli_main(doc, define_flags, record, argv, **settings)
        if found[-1].arguments and not arguments:
            raise SystemExit(f"Error: unknown argument {found[-1].arguments[0]!r}.")

    module = "concat_jax.main" if module == SCENIC_MAIN else module
    cli_main, main = cli.main, importlib.import_module(module).main
    if isinstance(main, functools.partial):
        note(*main.args, [module, *words], **main.keywords)
        return found[-1]
    with mock.patch.object(cli, "main", note):
        main([module, *words])
    return found[-1]
