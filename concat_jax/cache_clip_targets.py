"""Computes CLIP's embedding of every training image and segment once, for stage 1 to learn from.

python -m concat_jax.cache_clip_targets --config=configs/coco_zps.py \\
    --config.data.clip_targets=FOLDER --config.data.root=/path/to/coco --config.init.clip=...

Takes the flags of the training run that shall use the targets. Where that run trains its own CLIP,
--workdir names the run whose CLIP stage is finished. Images are embedded as they are, at native
size. A command that was stopped goes on where it stood when started again. Several hosts share the
work in a folder that all of them see: with --distributed, or each on its own when told which one of
how many it is (--process_index=1 --process_count=4), since they have nothing to say to each other.
"""

from __future__ import annotations

import jax

from concat_jax.core import cli
from concat_jax.experiment.clip_target_cache import cache


def define_flags(flags: cli.Flags) -> None:
    flags.integer("images_per_shard", 256, "What a kill can cost, at least.")
    flags.integer("pictures_per_device", 128, "CLIP takes at once.")
    flags.integer("process_index", None, "This host; JAX's own by default.")
    flags.integer("process_count", None, "Hosts; JAX's own by default.")


@cli.command(
    __doc__,
    define_flags,
    with_config=True,
    interrupted="Stopped; finished shards are kept, and the same command goes on.",
)
def main(given: cli.Flags) -> None:
    config = cli.config_of(given)
    cli.join_hosts(given)
    index, count = given.process_index, given.process_count
    report = cache(
        config,
        given.workdir or "",
        images_per_shard=given.images_per_shard,
        pictures_per_device=given.pictures_per_device,
        process_index=jax.process_index() if index is None else index,
        process_count=jax.process_count() if count is None else count,
    )
    left_out = f" {report.bad_images} unreadable images are left out." if report.bad_images else ""
    print(f"Done: {report.written} shards written, {report.skipped} skipped.{left_out}")


if __name__ == "__main__":
    main()
