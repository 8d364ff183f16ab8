"""The formats of an exported program: how each is written, and loaded again."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from concat_jax.exporting.program import NAMES, Program

PLATFORMS = ("cpu", "cuda", "tpu")
# The lowest that jax2onnx writes this graph in, for the runtimes of 2024 and later.
ONNX_OPSET = 21

Call = Callable[..., dict[str, Any]]


class Format(NamedTuple):
    """One way to write a program.

    Attributes:
      file: name of the artefact, a file or a folder.
      packages: what must be installed besides the requirements of all.
      write: a program to a path.
      load: a path -> call(*inputs) -> outputs by name.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[Program, Path], None]
    load: Callable[[Path], Call]

    def check_installed(self, name: str) -> None:
        """Raise a ValueError that says what to install if a package is missing."""
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            raise ValueError(
                f"--format={name} needs {' and '.join(missing)}, which is optional: "
                "pip install -r requirements-export.txt"
            )

    def versions(self) -> dict[str, str]:
        """Of JAX and what else wrote the artefact."""
        owners = importlib.metadata.packages_distributions()
        return {
            package: importlib.metadata.version(owners[package][0])
            for package in ("jax", *self.packages)
        }


def _write_jax(program: Program, path: Path) -> None:
    (names,) = jax.export.symbolic_shape(NAMES)
    function = jax.jit(functools.partial(program.call, program.params))
    export = jax.export.export(function, platforms=PLATFORMS)
    exported = export(*(spec.struct(names) for spec in program.inputs.values()))
    path.write_bytes(exported.serialize())


def _load_jax(path: Path) -> Call:
    return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def _write_saved_model(program: Program, path: Path) -> None:
    tf = _tensorflow()
    from jax.experimental import jax2tf

    polymorphic = [f"({', '.join(map(str, spec.shape))})" for spec in program.inputs.values()]
    converted = jax2tf.convert(
        program.call,
        polymorphic_shapes=[None, *polymorphic],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    module = tf.Module()
    params = jax.tree.map(lambda array: tf.Variable(np.asarray(array)), program.params)
    module.weights = jax.tree.leaves(params)
    signature = [
        tf.TensorSpec([None if side == NAMES else side for side in spec.shape], spec.dtype, name)
        for name, spec in program.inputs.items()
    ]
    call = functools.partial(converted, params)
    module.segment = tf.function(lambda *inputs: call(*inputs), signature, autograph=False)
    signatures = {"serving_default": module.segment.get_concrete_function()}
    tf.saved_model.save(module, str(path), signatures)


def _load_saved_model(path: Path) -> Call:
    model = _tensorflow().saved_model.load(str(path))
    return lambda *inputs: model.segment(*inputs)  # which keeps the model, and its weights


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # greetings
    import tensorflow

    return tensorflow


def _write_onnx(program: Program, path: Path) -> None:
    with _quiet():  # it tells which of its plugins this JAX is too new for
        import onnx
        import onnx_ir
        from jax2onnx import to_onnx
        from onnx_ir.passes import common

    def call(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        outputs = program.call(program.params, *inputs)
        return tuple(outputs[name] for name in program.outputs)

    with _quiet():
        model = to_onnx(
            call,
            # An open side is for shapes alone, which are of float32.
            [s.shape if NAMES in s.shape else s.struct(None) for s in program.inputs.values()],
            model_name="concat_jax",
            opset=ONNX_OPSET,
            input_names=list(program.inputs),
            output_names=list(program.outputs),
        )
    # ONNX Runtime's optimizer loses identities of constants, which stop_gradient becomes, and it
    # warns of every constant that no node reads.
    model = onnx_ir.from_proto(model)
    for tidy in (common.IdentityEliminationPass(), common.RemoveUnusedNodesPass()):
        model = tidy(model).model
    model = onnx_ir.to_proto(model)
    for output, spec in zip(model.graph.output, program.outputs.values(), strict=True):
        for dimension, side in zip(output.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(side, str):  # the converter calls it K
                dimension.dim_param = side
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _load_onnx(path: Path) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs, outputs = ([a.name for a in f()] for f in (session.get_inputs, session.get_outputs))

    def call(*arrays: np.ndarray) -> dict[str, np.ndarray]:
        found = session.run(outputs, dict(zip(inputs, arrays, strict=True)))
        return dict(zip(outputs, found, strict=True))

    return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


FORMATS = {
    "jax": Format("model.jax", ("flatbuffers",), _write_jax, _load_jax),
    "savedmodel": Format("saved_model", ("tensorflow",), _write_saved_model, _load_saved_model),
    "onnx": Format("model.onnx", ("jax2onnx", "onnx", "onnxruntime"), _write_onnx, _load_onnx),
}
