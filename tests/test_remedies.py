"""What error messages tell people to do can be done: commands, flags and config keys exist."""

import ast
import functools
import re

import pytest

from tests.command_lines import (
    PLACEHOLDERS,
    ROOT,
    commands,
    commands_in,
    config_keys,
    flags_in,
    is_flag,
    is_known_key,
    takes,
)


def sources():
    for package in ("concat_jax", "data_pipelines", "configs"):
        yield from sorted((ROOT / package).rglob("*.py"))


def text_of(node):
    """A string as written, with * for what an f-string fills in; None for another node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(p.value if isinstance(p, ast.Constant) else "*" for p in node.values)
    return None


def strings(tree):
    """(line, text) of every outermost string that is no docstring."""
    bare = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    inner = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in ast.walk(n)}
    for node in ast.walk(tree):
        is_inner = id(node) in inner and not isinstance(node, ast.JoinedStr)
        if id(node) not in bare and not is_inner and text_of(node) is not None:
            yield node.lineno, text_of(node)


@functools.cache
def messages():
    """(place, text) of everything that looks like words for people."""
    found = []
    for path in sources():
        for line, text in strings(ast.parse(path.read_text(encoding="utf-8"))):
            if " " in text:
                found.append((f"{path.relative_to(ROOT)}:{line}", path, text))
    return found


def test_there_is_something_to_check():
    texts = [text for _, _, text in messages()]
    assert sum(bool(list(commands_in(text))) for text in texts) > 10
    assert sum(bool(flags_in(text)) for text in texts) > 30
    assert sum("config." in text for text in texts) > 20
    assert len(commands()) > 8 and len(config_keys()) > 100


def test_commands_in_messages_exist_and_have_their_flags():
    wrong = []
    for place, _, text in messages():
        for module, rest in commands_in(text):
            if module in ("pip", "json.tool"):
                continue
            if module not in commands():
                wrong.append(f"{place}: there is no command {module}")
                continue
            for flag in flags_in(rest):
                if not flag.startswith("--config") and not is_flag(flag, module):
                    wrong.append(f"{place}: {module} has no flag {flag}")
    assert not wrong, "\n".join(wrong)


def test_flags_in_messages_exist():
    """A command's own message names flags of its own; what many use, a flag of one of them."""
    wrong = []
    for place, path, text in messages():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for module, rest in commands_in(text):  # these are checked above
            text = text.replace(f"python -m {module}{rest}", "")
        text = re.sub(r"pip (un)?install( --[a-z-]+)*", "", text)  # with flags of its own
        for flag in flags_in(text):
            known = [name] if name in commands() else commands()
            if not any(is_flag(flag, module) for module in known):
                wrong.append(f"{place}: no command has the flag {flag}: {text[:80]!r}")
    assert not wrong, "\n".join(wrong)


def test_values_of_flags_in_messages_are_taken():
    wrong = []
    for place, _, text in messages():
        for name, value in re.findall(r"(?<![\w-])--([a-z]\w*)=([\w,]+)(?![\w*.:/])", text):
            if name in ("config", "workdir", *(flag[2:] for flag in PLACEHOLDERS)):
                continue
            if value.isupper() or any(takes(module, name, value) for module in commands()):
                continue  # capitals stand for what people put there
            wrong.append(f"{place}: no command takes --{name}={value}")
    assert not wrong, "\n".join(wrong)


def test_config_keys_in_messages_exist():
    wrong = []
    for place, _, text in messages():
        for key in re.findall(r"(?<![\w./])config\.([a-z_*][\w.*]*[\w*])", text):
            if key.split(".")[-1] in ("json", "py"):
                continue
            # Capitals stand for what people put there.
            if not is_known_key(re.sub(r"\b[A-Z]+\b", "*", key)):
                wrong.append(f"{place}: no config has config.{key}: {text[:80]!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("data.root", True),
        ("train.*.method.targets", True),
        ("eval.settings.gamma", True),
        ("train.con.method.temprature", False),
        ("dat.root", False),
    ],
)
def test_known_keys(key, known):
    assert is_known_key(key) == known


def test_text_files_name_their_encoding():
    """The locale's encoding is Latin-1 or ASCII on some machines, and class names are not."""
    wrong = []
    for path in sources():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            keywords = {keyword.arg for keyword in call.keywords}
            texts = [text_of(arg) or "" for arg in call.args]
            modes = [t for t in texts[-1:] if re.fullmatch(r"[rwax]t?\+?", t)]
            of_path = isinstance(call.func, ast.Attribute)
            positional = len(call.args) > (name == "write_text") and of_path
            writes = name in ("write_text", "read_text") and of_path and not positional
            if (writes or (name == "open" and modes)) and "encoding" not in keywords:
                if "/proc/" not in ast.unparse(call):
                    wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not wrong, "\n".join(wrong)
