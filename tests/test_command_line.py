"""Mistakes on a command line end in one sentence that says what to do."""

import pytest
from absl import flags

from concat_jax import command_line


def ended(function, *arguments, capsys):
    """The sentence that a call ended the program with."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert capsys.readouterr() == ("", "")
    return stop.value.code


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rot=a"], "Error: there is no flag '--rot'; did you mean '--root'?"),
        (["--roo=a"], "Error: there is no flag '--roo'; did you mean '--root'?"),
        (["a", "b"], "Error: unknown argument 'b'."),
        (["--size=x"], "Error: argument --size: invalid int value: 'x'."),
    ],
)
def test_parser(arguments, sentence, capsys):
    parser = command_line.Parser()
    parser.add_argument("name", nargs="?")
    parser.add_argument("--root")
    parser.add_argument("--size", type=int)
    assert vars(parser.parse_args(["n", "--size=3"])) == {"name": "n", "root": None, "size": 3}
    assert ended(parser.parse_args, arguments, capsys=capsys) == sentence


def test_absl_flags():
    values = flags.FlagValues()
    flags.DEFINE_integer("size", 1, "", flag_values=values)
    assert command_line.parse_absl_flags(values, ["command", "--size=3", "a"]) == ["command", "a"]
    assert values.size == 3
    with pytest.raises(ValueError, match="^there is no flag '--siez'; did you mean '--size'\\?$"):
        command_line.parse_absl_flags(values, ["command", "--siez=3"])
    with pytest.raises(flags.IllegalFlagValueError):
        command_line.parse_absl_flags(values, ["command", "--size=x"])


def test_errors_end_in_one_line(capsys):
    def fail(error, *others):
        with command_line.one_sentence(*others):
            raise error

    assert ended(fail, ValueError("two\n  lines."), capsys=capsys) == "Error: two lines."
    assert ended(fail, OSError("no disk."), capsys=capsys) == "Error: no disk."
    assert ended(fail, KeyError("k"), KeyError, capsys=capsys) == "Error: 'k'"
    with pytest.raises(KeyError):
        fail(KeyError("k"))


def test_arguments_that_are_no_flags(capsys):
    command_line.check_no_arguments(["command"], "--size=3")
    assert ended(
        command_line.check_no_arguments, ["command", "size"], "--size=3", capsys=capsys
    ) == ("Error: unknown argument 'size'; flags look like --size=3.")
