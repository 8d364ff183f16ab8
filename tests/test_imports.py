"""What imports what: layers in one direction, and TensorFlow and torch nowhere."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULES = sorted(ROOT.glob("concat_jax/**/*.py"))

# What each room may import besides itself, lowest first. Nobody imports a command.
RULE = {
    "core": set(),
    "text": {"core"},
    "models": {"core"},
    "losses": {"core", "models"},
    "stages": {"core", "models", "losses"},
    "training": {"core", "models", "losses", "stages"},
    "neighbours": {"core", "losses"},
    "weights": {"core", "models", "text"},
    "visualize": {"core"},
    "data_pipelines": {"core"},
    "inference": {"core", "models", "text", "weights", "visualize", "data_pipelines"},
    "evaluation": {"core", "models", "weights", "visualize", "inference"},
    "exporting": {"core", "models", "inference"},
}
RULE["experiment"] = set(RULE)
RULE["scenic_project"] = set(RULE)
RULE["benchmarking"] = set(RULE)
RULE["page"] = {"core", "visualize", "inference", "data_pipelines"}
RULE["commands"] = set(RULE)
HEAVY = {"tensorflow", "tensorflow_datasets", "torch", "torchvision", "transformers"}

# In a fresh interpreter these cannot be imported; what remains must do.
WITHOUT = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "torch", "transformers", "clu", "tensorboard"):
    sys.modules[name] = None
"""

IMPORT_ALL = """
import importlib, pkgutil
import concat_jax
names = [m.name for m in pkgutil.walk_packages(concat_jax.__path__, "concat_jax.")]
for name in names:
    importlib.import_module(name)
print(len(names), "modules imported")
"""

TRAIN = """
import pathlib
import jax, jax.numpy as jnp, numpy as np
from concat_jax.stages import pretrain_clip
from concat_jax.stages.stage import Context
from concat_jax.models.networks import make_networks
from concat_jax.training.loop import LoopConfig, train_stage
from concat_jax.training.optimizer import OptimizerConfig
from concat_jax.training.sharding import make_mesh

jax.config.update("jax_disable_most_optimizations", True)
networks = make_networks(dict(
    clip=dict(embed_dim=8, image_size=16, patch_size=8, image_width=8, image_depth=1,
              image_heads=1, text_width=8, text_depth=1, text_heads=1, vocab_size=8,
              context_length=4),
    segmentor=dict(width=32), projector=dict(hidden_width=8), generator=dict(hidden_width=8)))

def batches(first, count):
    for step in range(first, first + count):
        rng = np.random.default_rng(step)
        yield dict(image=rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8),
                   tokens=rng.integers(0, 8, (4, 4), dtype=np.int32))

params = train_stage(
    "clip",
    pretrain_clip.make_stage(Context(networks, None), pretrain_clip.Config()),
    params={"clip": jax.jit(networks.init, static_argnums=0)("clip", jax.random.key(0))},
    frozen={},
    batches=batches,
    workdir=pathlib.Path(WORKDIR),
    mesh=make_mesh(devices=1),
    loop=LoopConfig(steps=2, log_every=1, tensorboard=True),
    optimizer=OptimizerConfig(),
)
assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
"""


def python(source, cwd):
    return subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_import_and_training_without_tensorflow_torch_and_clu(tmp_path):
    """With `tensorboard` on, the loop says in a sentence what it cannot write and goes on."""
    result = python(f"WORKDIR = {str(tmp_path)!r}\n{WITHOUT}{IMPORT_ALL}{TRAIN}", tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{len(MODULES) - 1} modules imported" in result.stdout  # all but concat_jax itself
    (sentence,) = [line for line in result.stdout.splitlines() if "TensorBoard" in line]
    assert "metrics.jsonl is" in sentence
    assert len((tmp_path / "clip" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list(tmp_path.rglob("events.out*"))


def imports(path):
    """(module, whether only a type checker sees it, whether inside a function) of a file."""
    tree = ast.parse(path.read_text())
    found = []

    def visit(node, typing_only, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, typing_only, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: imports are absolute here"
                found.append((child.module, typing_only, inside))
                # `from concat_jax.stages import con` is an import of concat_jax.stages.con.
                found.extend(
                    (f"{child.module}.{alias.name}", typing_only, inside) for alias in child.names
                )
            checking = (
                isinstance(child, ast.If)
                and isinstance(child.test, ast.Name)
                and child.test.id == "TYPE_CHECKING"
            )
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, typing_only or checking, inside or function)

    visit(tree, False, False)
    return found


def room_of(module):
    """The room of a module of ours, "commands" for the package's own; None for others'."""
    package, *inner = module.split(".")
    if package == "data_pipelines":
        return package
    if package != "concat_jax" or not inner:
        return None
    return inner[0] if (ROOT / "concat_jax" / inner[0]).is_dir() else "commands"


def modules_of(room):
    for path in [*MODULES, *sorted(ROOT.glob("data_pipelines/**/*.py"))]:
        if room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) == room:
            yield path


def test_every_module_belongs_to_a_room():
    known = set(RULE) | {None}
    rooms = {room_of(f"concat_jax.{path.name}") for path in (ROOT / "concat_jax").iterdir()}
    assert rooms - {"__pycache__"} <= known


@pytest.mark.parametrize("room", RULE)
def test_imports_run_one_way(room):
    paths = list(modules_of(room))
    assert paths
    breaches = {
        (str(path.relative_to(ROOT)), module)
        for path in paths
        for module, _, _ in imports(path)
        if module != "concat_jax" and room_of(module) not in {None, room, *RULE[room]}
    }
    assert not breaches


def test_the_package_root_holds_commands():
    for path in (ROOT / "concat_jax").glob("*.py"):
        if path.name != "__init__.py":
            text = path.read_text()
            assert 'if __name__ == "__main__":' in text, path.name
            assert len(text.splitlines()) <= 250, f"{path.name}: what it does belongs in a room"


def test_a_file_and_a_room_can_be_taken_in():
    paths = [*MODULES, *ROOT.glob("data_pipelines/**/*.py"), *ROOT.glob("configs/*.py")]
    assert not [str(path) for path in paths if len(path.read_text().splitlines()) > 400]
    rooms = {folder: list(folder.glob("*.py")) for folder in {path.parent for path in paths}}
    assert not [str(folder) for folder, files in rooms.items() if len(files) > 16]


def test_no_module_imports_tensorflow_or_torch():
    """But for the benchmark's other side and a SavedModel, which import theirs when asked for."""
    found = {
        (str(path.relative_to(ROOT / "concat_jax")), typing_only or inside)
        for path in MODULES
        for module, typing_only, inside in imports(path)
        if module.split(".")[0] in HEAVY
    }
    assert found <= {("benchmarking/reference.py", True), ("exporting/formats.py", True)}


def test_clu_is_imported_by_what_writes_metrics_when_asked_for():
    found = {
        (path.stem, inside)
        for path in MODULES
        for module, _, inside in imports(path)
        if module.split(".")[0] in ("clu", "tensorboard")
    }
    assert found == {("metrics", True), ("scenic_main", True)}


def test_the_package_imports_nothing_until_a_model_is_loaded():
    found = imports(ROOT / "concat_jax" / "__init__.py")
    assert any(inside for *_, inside in found)
    at_once = {module.split(".")[0] for module, *later in found if not any(later)}
    assert at_once <= sys.stdlib_module_names


def test_configs_import_nothing_that_computes():
    """A config must load in an instant and on a machine without an accelerator."""
    for path in sorted(ROOT.glob("configs/*.py")):
        for module, _, _ in imports(path):
            light = module.split(".")[0] in ("ml_collections", "configs")
            assert light or module.startswith("concat_jax.core.config"), f"{path.name}: {module}"
