"""What imports what: layers in one direction, and TensorFlow and torch nowhere."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULES = sorted(ROOT.glob("concat_jax/**/*.py"))

# Each layer and what it may import besides itself, lowest first.
LAYERS = {
    "text": set(),
    "configuration": set(),
    "command_line": {"configuration"},
    "image_files": set(),
    "models": {"text", "configuration"},
    "weights": {"models", "text", "configuration"},
    "losses": {"models"},
    "stages": {"losses", "models", "text", "configuration"},
    "training": {"stages", "losses", "models", "text", "configuration"},
    # Scoring knows how a prediction is made, and nothing of how it was trained.
    "evaluation": {"models", "text", "configuration", "image_files"},
    "prediction": {"evaluation", "weights", "models", "text", "configuration", "image_files"},
    "query_extraction": {"training", "stages", "losses", "models", "text", "configuration"},
    "class_text": {"weights", "models", "text", "configuration"},
    "workdir": {"evaluation", "configuration"},
    "compilation_cache": set(),
    "host_memory": set(),
    # Times everything there is, and so sees all of it.
    "benchmarking": {
        "training",
        "stages",
        "losses",
        "evaluation",
        "weights",
        "models",
        "text",
        "configuration",
        "compilation_cache",
        "host_memory",
    },
}
COMMAND_LINES = (
    "main",
    "predict",
    "convert",
    "ablation",
    "benchmark",
    "calibrate",
    "evaluate",
    "query_space",
    "tpu_report",
    "run",
    "stage_batches",
)
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
    pretrain_clip.make_stage(networks, pretrain_clip.PretrainClipConfig()),
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


def layer_of(path):
    return path.relative_to(ROOT / "concat_jax").with_suffix("").parts[0]


def test_every_module_belongs_to_a_layer():
    known = {*LAYERS, *COMMAND_LINES, "__init__"}
    assert {layer_of(path) for path in MODULES} <= known


def breaches(path):
    """Imports of a module in a layer that its layer may not make."""
    layer = layer_of(path)
    allowed = LAYERS[layer] | {layer}
    for module, _, _ in imports(path):
        if module.startswith("concat_jax."):
            inner = module.removeprefix("concat_jax.")
            if not any(inner == name or inner.startswith(name + ".") for name in allowed):
                # `from concat_jax import configuration` names the package first.
                if not any(name.startswith(inner + ".") for name in allowed):
                    yield module


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    paths = [path for path in MODULES if layer_of(path) == layer]
    assert paths
    found = {str(path.relative_to(ROOT)): sorted(set(breaches(path))) for path in paths}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_data_pipelines_are_imported_by_command_lines_only():
    found = {
        (path.stem, typing_only)
        for path in MODULES
        for module, typing_only, _ in imports(path)
        if module.split(".")[0] == "data_pipelines"
    }
    at_run_time = {name for name, typing_only in found if not typing_only}
    assert "main" in at_run_time
    assert at_run_time <= set(COMMAND_LINES) - {"run", "stage_batches"}
    assert {name for name, typing_only in found if typing_only} <= {"run"}


def test_no_module_imports_tensorflow_or_torch():
    """But for the benchmark's other side, which imports its reference when it is asked for."""
    found = {
        (str(path.relative_to(ROOT / "concat_jax")), typing_only or inside)
        for path in MODULES
        for module, typing_only, inside in imports(path)
        if module.split(".")[0] in HEAVY
    }
    assert found <= {("benchmarking/reference.py", True)}


def test_pipelines_never_import_a_command_line():
    for path in sorted(ROOT.glob("data_pipelines/*.py")):
        modules = {module for module, _, _ in imports(path)}
        assert "data_pipelines.cache_clip_targets" not in modules, path.name


def test_clu_is_imported_by_the_metric_writer_when_asked_for():
    found = {
        (path.stem, inside)
        for path in MODULES
        for module, _, inside in imports(path)
        if module.split(".")[0] in ("clu", "tensorboard")
    }
    assert found == {("metric_writer", True)}


def test_data_pipelines_know_of_the_package_only_names_and_settings():
    """Plain numpy batches cross this border: no network, loss or stage is in sight."""
    # Threads and file formats, none with JAX.
    allowed = (
        "text",
        "configuration",
        "command_line",
        "image_files",
        "training.prefetch",
        "evaluation.run_lengths",
    )
    command_lines = {"cache_clip_targets"}
    for path in sorted(ROOT.glob("data_pipelines/*.py")):
        if path.stem in command_lines:
            continue
        for module, _, _ in imports(path):
            if module.startswith("concat_jax."):
                inner = module.removeprefix("concat_jax.")
                known = any(inner == name or inner.startswith(name + ".") for name in allowed)
                assert known, f"{path.name}: {module}"


def test_configs_import_nothing_that_computes():
    """A config must load in an instant and on a machine without an accelerator."""
    for path in sorted(ROOT.glob("configs/*.py")):
        for module, _, _ in imports(path):
            light = module.split(".")[0] in ("ml_collections", "configs")
            assert light or module.startswith("concat_jax.configuration"), f"{path.name}: {module}"
