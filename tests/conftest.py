"""Shared by all tests: how programs compile, where data is, and what was skipped and why."""

import collections
import ctypes
import gc
import os
import pathlib
import re
import shutil
import sys
import tempfile

# One folder of compiled programs for the session: its workers and the processes that tests start
# inherit it. Set before JAX is imported, which reads it then.
_OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="concat_jax_xla_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most programs run once, so that compiling them is what a test costs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import jax  # noqa: E402
import pytest  # noqa: E402

# Sharding tests need several devices; every other test uses the first one and does not notice.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """XLA's older emitters of loops compile a program in half the time of those that users have.

    Slow tests keep the latter. XLA ends a process whose flag it does not know, as a later jaxlib
    may have dropped this one; XLA reads it when the first program is compiled.
    """
    if config.option.markexpr == "not slow" and jax.__version_info__ < (0, 11):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder with real COCO panoptic images, golden cases and vocabularies.

    Set CONCAT_JAX_TEST_DATA to point elsewhere than `../shared/data` beside the repository.
    """
    default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("CONCAT_JAX_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"development data is not at {path}; set CONCAT_JAX_TEST_DATA to its folder")
    return path


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """After each file its compiled programs go, which few other files run and all would keep."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@pytest.fixture(scope="module")
def as_users_compile():
    """For files that compare programs to the bit or measure them: compiled as outside of tests."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")  # for processes that tests start
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_xdist_make_scheduler(config, log):
    """A file stays on one worker: its module fixtures and its programs are made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


# What a missing module comes with: a file of requirements beside requirements.txt.
COMES_WITH = {
    "torch": "reference",
    "transformers": "reference",
    "tensorflow": "data",
    "tensorflow_datasets": "data",
    "clu": "tensorboard",
    "libtpu": "tpu",
    "gradio": "page",
    "jax2onnx": "export",
    "onnx": "export",
    "onnxruntime": "export",
    "gcp_storage_emulator": "reference",
}


def skip_reason(report) -> str:
    """Why a test was skipped; whatever lacks the same file of requirements says so alike."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    missing = re.search(r"could not import '(\w+)", reason)
    if missing and missing[1] in COMES_WITH:
        file = f"requirements-{COMES_WITH[missing[1]]}.txt"
        return f"needs what is not installed: pip install -r {file}"
    return reason.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter):
    """How many tests were skipped for which reason; of a file skipped whole none was collected."""
    skipped = terminalreporter.stats.get("skipped", ())
    kinds = ("whole files", "tests")
    counts = collections.Counter(
        (kinds[isinstance(report, pytest.TestReport)], skip_reason(report)) for report in skipped
    )
    if counts:
        terminalreporter.section("skipped", sep="-")
        for (kind, reason), count in counts.most_common():
            terminalreporter.write_line(f"{count:5} {kind}: {reason}")


def pytest_unconfigure(config):
    if _OWN_CACHE and not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
