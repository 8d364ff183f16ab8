"""The loop on a toy stage: resume, non-finite loss, checkpoints of another shape."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.stages.stage import Stage
from concat_jax.training.checkpoints import CheckpointError, StageCheckpoints
from concat_jax.training.loop import LoopConfig, NonFiniteLossError, train_stage
from concat_jax.training.optimizer import OptimizerConfig
from concat_jax.training.sharding import make_mesh, replicated

OPTIMIZER = OptimizerConfig(learning_rate=0.1, schedule="cosine", clip_norm=1.0)


def loss(params, frozen, batch, rng):
    noise = jax.random.normal(rng, ()) * 0.1
    prediction = batch["x"] @ params["head"]["kernel"] + frozen["shift"] + noise
    value = jnp.mean((prediction - batch["y"]) ** 2)
    return value, {"loss": value}


STAGE = Stage(("head",), ("shift",), loss, ((r".*", 1.0, 1.0),), ("x", "y"))


def batch(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1), "image_id": np.arange(8) + 100 * step}


def run(workdir, *, steps=6, stop=None, width=3, batch_fn=batch, save_every=2):
    seen = []

    def batches(first, count):
        for step in range(first, first + count):
            if step == stop:
                raise KeyboardInterrupt
            seen.append(step)
            yield batch_fn(step)

    params = train_stage(
        "toy",
        STAGE,
        params={"head": {"kernel": jnp.zeros(width)}},
        frozen={"shift": jnp.ones(())},
        batches=batches,
        workdir=workdir,
        mesh=make_mesh(devices=2),
        loop=LoopConfig(steps=steps, log_every=3, save_every=save_every, tensorboard=False),
        optimizer=OPTIMIZER,
    )
    return np.asarray(params["head"]["kernel"]), seen


def test_a_killed_run_resumes_as_if_unbroken(tmp_path, capsys):
    unbroken, _ = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=5)
    resumed, seen = run(tmp_path / "b")
    assert seen == [4, 5]  # the last save was after step 4
    np.testing.assert_array_equal(resumed, unbroken)
    printed = capsys.readouterr().out
    assert "resumes at step 4" in printed and "ETA" in printed
    rows = [json.loads(line) for line in (tmp_path / "b/toy/metrics.jsonl").open()]
    assert rows[-1]["step"] == 6 and rows[-1]["loss"] > 0


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first, _ = run(tmp_path)
    again, seen = run(tmp_path)
    assert seen == []
    np.testing.assert_array_equal(first, again)


def test_parameters_are_printed_by_rule(tmp_path, capsys):
    run(tmp_path, steps=1)
    printed = capsys.readouterr().out
    assert "trained head                  3 parameters  lr x1, decay x1" in printed
    assert "taken   shift" in printed


def test_non_finite_loss_names_step_images_and_checkpoint(tmp_path):
    def poisoned(step):
        result = batch(step)
        if step == 4:
            result["y"] = result["y"] * np.nan
        return result

    with pytest.raises(NonFiniteLossError) as error:
        run(tmp_path, batch_fn=poisoned)
    message = str(error.value)
    assert "step 4" in message and "400, 401" in message and "step 4 in" in message
    assert StageCheckpoints(tmp_path, "toy").latest_step() == 4  # and nothing poisoned was saved


def test_another_architecture_is_refused_by_name(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=r"head/kernel is \[3\], the config wants \[4\]"):
        run(tmp_path, steps=4, width=4)


def test_params_are_restored_on_other_devices(tmp_path):
    kernel, _ = run(tmp_path, steps=2)
    abstract = {"head": {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    checkpoints = StageCheckpoints(tmp_path, "toy")
    restored = checkpoints.restore_params(["head"], abstract, replicated(make_mesh(devices=4)))
    np.testing.assert_array_equal(restored["head"]["kernel"], kernel)
    assert len(restored["head"]["kernel"].sharding.device_set) == 4
    with pytest.raises(CheckpointError, match="tail/kernel is missing"):
        checkpoints.restore_params(["tail"], {"tail": abstract["head"]}, replicated(make_mesh()))
    with pytest.raises(CheckpointError, match="run stage 'other' first"):
        StageCheckpoints(tmp_path, "other").restore_params(
            ["head"], abstract, replicated(make_mesh())
        )


def test_batch_that_does_not_divide_is_named(tmp_path):
    with pytest.raises(ValueError, match="'x' has 3 rows for 2 devices"):
        run(tmp_path, batch_fn=lambda step: {k: v[:3] for k, v in batch(step).items()})
