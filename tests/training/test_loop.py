"""The loop on a toy stage: resume, non-finite loss, checkpoints of another shape."""

import dataclasses
import gzip
import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from concat_jax.core import stopping
from concat_jax.stages.stage import Stage
from concat_jax.training.checkpoints import CheckpointError, StageCheckpoints
from concat_jax.training.loop import LoopConfig, NonFiniteLossError, train_stage
from concat_jax.training.optimizer import OptimizerConfig
from concat_jax.training.profile import ProfileConfig
from concat_jax.training.sharding import make_mesh, replicated
from concat_jax.training.speed import PEAKS
from concat_jax.training.state import TrainState, make_train_step

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


def run(workdir, *, steps=6, stop=None, width=3, batch_fn=batch, save_every=2, look=None, **loop):
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
        loop=LoopConfig(steps=steps, log_every=3, save_every=save_every, tensorboard=False, **loop),
        optimizer=OPTIMIZER,
        look=look,
    )
    return np.asarray(params["head"]["kernel"]), seen


def masked_loss(params, frozen, batch, rng):
    """Normalised by what is marked, as masks are by their number."""
    errors = (batch["x"] @ params["head"]["kernel"] + frozen["shift"] - batch["y"]) ** 2
    value = jnp.sum(errors * batch["marks"]) / jnp.sum(batch["marks"])
    return value, {"loss": value}


def test_accumulated_batches_update_as_one(tmp_path):
    """Two batches of 8 as one of 16 where both mark as many rows; resumed amid an update."""
    stage = dataclasses.replace(STAGE, loss=masked_loss, batch_fields=("x", "y", "marks"))

    def train(name, halves, marks=(5, 5), stop=None):
        """`halves` of 16 rows are a batch, of which 1 or 2 make an update."""
        count = 2 // halves

        def batches(first, number):
            for step in range(first, first + number):
                if step == stop:
                    raise KeyboardInterrupt
                numbers = range(halves * step, halves * (step + 1))
                rows = [{**batch(i), "marks": np.arange(8) < marks[i % 2]} for i in numbers]
                yield {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}

        optimizer = dict(learning_rate=0.1, warmup_steps=count, decay_at=(0.6, 0.8), clip_norm=1.0)
        return train_stage(
            "toy",
            stage,
            params={"head": {"kernel": jnp.zeros(3)}},
            frozen={"shift": jnp.ones(())},
            batches=batches,
            workdir=tmp_path / name,
            mesh=make_mesh(devices=2),
            loop=LoopConfig(steps=5 * count, save_every=5, tensorboard=False),
            optimizer=OptimizerConfig(**optimizer, accumulate=count),
        )["head"]["kernel"]

    whole, parts = train("whole", 2), train("parts", 1)
    assert np.abs(whole).min() > 0.1
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    with pytest.raises(KeyboardInterrupt):
        train("broken", 1, stop=6)
    np.testing.assert_array_equal(train("broken", 1), parts)
    # A mean of means is another one where a half marks more.
    uneven = [train(f"uneven{halves}", halves, (1, 8)) for halves in (1, 2)]
    assert np.abs(uneven[0] - uneven[1]).max() > 1e-3


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
    assert rows[-1]["images_per_second"] == 8 * rows[-1]["steps_per_second"]
    assert 0 <= rows[-1]["data_wait"] <= 1 and "mfu" not in rows[-1]


def test_looks_are_due_by_the_step_and_leave_the_training_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(PEAKS, jax.devices()[0].device_kind, 1e9)
    looks = []

    def look(step, params, writer):
        # Another mesh than the training's, as inference on a host's own devices has it.
        kernel = jax.device_put(params["head"]["kernel"], replicated(make_mesh(devices=1)))
        looks.append((step, float(jnp.sum(kernel))))
        writer.scalars(step, {"eval/hpq": 1.0 * step})
        return {"hpq": 1.0 * step}

    seen, _ = run(tmp_path / "seen", look=look, eval_every=2)
    unseen, _ = run(tmp_path / "unseen")
    np.testing.assert_array_equal(seen, unseen)
    assert [step for step, _ in looks] == [2, 4, 6] and len({total for _, total in looks}) == 3
    rows = [json.loads(line) for line in (tmp_path / "seen/toy/metrics.jsonl").open()]
    assert [row["eval/hpq"] for row in rows if "eval/hpq" in row] == [2.0, 4.0, 6.0]
    # 8 rows of 3 numbers and their gradient, on two devices.
    trained = [row for row in rows if "mfu" in row]
    flops = 2 * 2 * 8 * 3
    assert trained[0]["mfu"] == pytest.approx(flops * trained[0]["steps_per_second"] / 2e9)


def test_a_trace_holds_the_steps_asked_for(tmp_path, capsys):
    run(tmp_path, profile=ProfileConfig(stage="toy", after=2, steps=2))
    (trace,) = (tmp_path / "toy/profile").glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "toy"]
    assert steps == ["2", "3"]
    ops = {event["args"].get("hlo_module") for event in events if "args" in event}
    assert "jit_train_step" in ops
    assert "Wrote a trace of 2 steps" in capsys.readouterr().out


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
    with pytest.raises(NonFiniteLossError) as error:
        run(tmp_path, batch_fn=poisoned(4))
    message = str(error.value)
    assert "step 4" in message and "400, 401" in message and "step 4 in" in message
    assert StageCheckpoints(tmp_path, "toy").latest_step() == 4  # and nothing poisoned was saved


def test_sigterm_saves_the_state_and_says_so(tmp_path):
    unbroken, _ = run(tmp_path / "a")

    def terminated(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(step)

    with pytest.raises(KeyboardInterrupt) as stop:
        with stopping.catching_sigterm("Stopped."):
            run(tmp_path / "b", batch_fn=terminated, save_every=0)
    done = StageCheckpoints(tmp_path / "b", "toy").latest_step()
    assert 1 <= done <= 3  # batches are read ahead of the steps
    assert str(stop.value) == (
        f"Stage 'toy' was stopped; step {done} is saved, and the same command goes on from there."
    )
    resumed, seen = run(tmp_path / "b")
    assert seen[0] == done
    np.testing.assert_array_equal(resumed, unbroken)


def test_sigterm_while_a_batch_does_not_come_saves_the_state(tmp_path):
    come = threading.Event()

    def stuck(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            come.wait(60)
        return batch(step)

    with pytest.raises(stopping.Terminated, match="step 3 is saved"):
        with stopping.catching_sigterm("Stopped."):
            run(tmp_path, batch_fn=stuck, save_every=0)
    come.set()


def test_sigterm_while_the_model_is_looked_at_saves_the_state(tmp_path):
    def look(done, params, writer):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it is interrupted")

    with pytest.raises(stopping.Terminated, match="step 3 is saved"):
        with stopping.catching_sigterm("Stopped."):
            run(tmp_path, look=look, eval_every=3, save_every=0)


def test_the_best_step_by_hpq_is_kept(tmp_path):
    def look(done, params, writer):
        return {"hpq": 40.0 - done}

    run(tmp_path, look=look, eval_every=2, keep=1)
    assert {path.name for path in (tmp_path / "toy/checkpoints").iterdir()} == {"2", "6"}


def poisoned(*steps):
    def poisoned_batch(step):
        result = batch(step)
        if step in steps:
            result["y"] = result["y"] * np.nan
        return result

    return poisoned_batch


def test_steps_that_are_not_finite_are_skipped_and_counted_up_to_a_limit(tmp_path, capsys):
    _, seen = run(tmp_path / "a", batch_fn=poisoned(1, 2, 4), max_skips=2, steps=6)
    assert seen == list(range(6)) and "skipped 3" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "a/toy/metrics.jsonl").open()]
    assert rows[-1]["skipped"] == 3 and np.isfinite(rows[-1]["loss"])
    with pytest.raises(NonFiniteLossError) as error:
        run(tmp_path / "b", batch_fn=poisoned(2, 3, 4, 5), max_skips=2)
    assert "at step 4 (images 400, 401" in str(error.value)
    assert ", 3 such steps in a row; the last good checkpoint is step 4 in" in str(error.value)


def test_a_skipped_step_changes_nothing():
    params, transform = {"head": {"kernel": jnp.ones(3)}}, optax.adam(0.1)
    frozen = {"shift": jnp.ones(())}

    def after(batches, **options):
        state, step = (
            TrainState.create(params, transform),
            make_train_step(loss, transform, 0, make_mesh(devices=1), **options),
        )
        for given in batches:
            state, metrics = jax.jit(step)(state, frozen, given)
        return state, metrics

    start = TrainState.create(params, transform)
    state, metrics = after([poisoned(0)(0)], skips=True)
    assert metrics["skipped"] == 1 and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, state.replace(step=start.step), start)
    jax.tree.map(
        np.testing.assert_array_equal, after([batch(0)], skips=True)[0], after([batch(0)])[0]
    )


def test_another_architecture_is_refused_by_name(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=r"head/kernel is \[3\], the config wants \[4\]"):
        run(tmp_path, steps=4, width=4)


def test_params_are_restored_on_other_devices(tmp_path):
    kernel, _ = run(tmp_path, steps=2)
    abstract = {"head": {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    checkpoints = StageCheckpoints(tmp_path, "toy")
    restored = checkpoints.restore_params(abstract, make_mesh(devices=4))
    np.testing.assert_array_equal(restored["head"]["kernel"], kernel)
    assert len(restored["head"]["kernel"].sharding.device_set) == 4
    with pytest.raises(CheckpointError, match="tail/kernel is missing"):
        checkpoints.restore_params({"tail": abstract["head"]}, make_mesh())
    with pytest.raises(CheckpointError, match="run stage 'other' first"):
        StageCheckpoints(tmp_path, "other").restore_params(abstract, make_mesh())


def test_batch_that_does_not_divide_is_named(tmp_path):
    with pytest.raises(ValueError, match="'x' has 3 rows for 2 devices"):
        run(tmp_path, batch_fn=lambda step: {k: v[:3] for k, v in batch(step).items()})
