"""What a process needs before it computes: kept programs, kept memory, options of the compiler."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import jax

XLA_FOLDER = Path.home() / ".cache" / "concat_jax" / "xla"
# With 11 MB instead of 16 the step of `configs/coco_zps.py` compiles for a v5e in two thirds of the
# time to an eighth less program, for 3 % more cycles by the compiler's count; with 8 for 10 %.
FUSION_MB = 11
# Names of glibc's mallopt (malloc.h): trim threshold, number of mmapped blocks. The number
# of arenas stays: in a single one what a compiler leaves behind makes every later search long.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def enable_compilation_cache() -> None:
    """Keeps compiled programs in `XLA_FOLDER` unless JAX_COMPILATION_CACHE_DIR names another."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(XLA_FOLDER))


def keep_freed_memory() -> None:
    """Has memory that is freed from now on stay with the process, for the next step to use.

    A step on a CPU takes gigabytes and gives them back at its end; glibc returns them to the
    system, which clears every page anew for the next one. Without glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def step_compiler_options(device_kind: str, fusion_mb: int = FUSION_MB) -> dict[str, int] | None:
    """XLA's options for a compiled train step on devices of a kind, as `jax.Device.device_kind`.

    On a CPU XLA orders a program so that independent parts can run side by side, which leaves more
    arrays alive: at R50 and 1024 x 1024 a quarter more memory for five per cent of the time.

    On a v5e ("TPU v5 lite") a fusion may fill `fusion_mb` of a core's vector memory, 16 by XLA's
    default, and XLA unrolls what fits: less compiles sooner to a smaller, somewhat slower program.
    """
    return {
        "cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False},
        "TPU v5 lite": {"xla_tpu_scoped_vmem_limit_kib": 1024 * fusion_mb},
    }.get(device_kind)


def light_compiler_options() -> dict[str, int] | None:
    """XLA's options for a program whose compilation outweighs what it computes: LLVM's level 1.

    On a CPU the first parameters of the demo's segmentor compile in 5 s instead of 14 and are the
    same to the bit. R50's forward pass compiles in two thirds of the time, the demo's in six
    sevenths, and neither runs slower: the time goes to a library's products and convolutions.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 1}
