"""What of a config a run refuses before its first stage, each in one sentence."""

import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.experiment import Experiment
from configs import demo_zps
from tests import tiny

VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, False), (1, 2))


def untrained(config):
    del config.train.finetune.takes["generator"]


def unknown_field(config):
    config.train.finetune.method.deviaton = 1.0


def unknown_optimizer_field(config):
    config.train.control.optimizer.momentum = 0.9


def unknown_schedule(config):
    config.train.control.optimizer.schedule = "cosin"


def unknown_choice(config):
    config.train.cat.method.contrast_distance = "manhattan"


def unknown_evaluation(config):
    config.eval.stages.finetuned = "full"


def unknown_network_field(config):
    config.model.generator.noise = 3


def no_training_of_it(config):
    config.model.segmentor.kind = "fcclip"


def unknown_rule(config):
    config.eval.keep_rules = ("objectnes",)


def no_progress(config):
    config.train.finetune.log_every = 0


def no_size(config):
    config.eval.settings.short_side = 0


def no_bank(config):
    config.train.finetune.bank_images = 0


def small_bank(config):
    config.train.finetune.bank_images = 31


def nothing_of_clip(config):
    config.train.cat.takes.projector = "clip"


def nothing_to_fill(config):
    config.train.con.copies = {"segmentor/backbon": "clip/vision_model/patch_embedding/trunk"}


def nothing_to_copy(config):
    config.train.con.copies = {"segmentor/backbone": "generator/x"}


def unknown_captions(config):
    config.train.clip.captions = "sen"


def oracle_of_real_data(config):
    config.train.control.oracle = True


def several_gammas(config):
    config.eval.settings.gamma = (0.0, 1.0)


def one_scene(config):
    config.seed, config.data.preset, config.data.num_eval_images = 5, "attributes", 1


def no_scale(config):
    config.model.projector.initial_scale = 0.0


def no_temperature(config):
    config.train.con.method.temperature = 0.0


def no_fold(config):
    method = dict(kind="regression", steps=0, generator={"kind": "regression"}, method={"folds": 1})
    config.train.cat = dict(config.train.cat.to_dict(), **method)


def no_segmentor(config):
    config.eval.stages = {"clip": "CLIP"}


def unread_clip(config):
    config.init = {"clip": "nothere"}


def unread_words(config):
    config.text.bpe_path = "nothere"


def pictures_below_none(config):
    config.eval.num_pictures = -1


def no_such_stage(config):
    config.profile.stage = "cno"


def too_late_a_trace(config):
    config.profile = {"stage": "con", "after": 2, "steps": 5}


def unknown_profile_field(config):
    config.profile.step = 5


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (no_such_stage, "config.profile.stage is none of config.stages: 'cno'.*'con'"),
        (too_late_a_trace, "no 5 steps after 2, but 4 in all; .*after=0 .*profile.steps=4"),
        (unknown_profile_field, "config.profile has no key 'step'.*'steps'"),
        (untrained, "'finetune' reads 'generator'; say in config.train.finetune.takes"),
        (unknown_field, "config.train.finetune.method has no key 'deviaton'.*'deviation'"),
        (unknown_optimizer_field, "config.train.control.optimizer has no key 'momentum'"),
        (unknown_schedule, "In config.train.control.optimizer: .*'cosin'; did you mean 'cosine'"),
        (unknown_choice, "CAT contrast_distance is 'manhattan'"),
        (unknown_evaluation, "config.eval.stages names no stage of 'finetuned'.*'finetune'"),
        (unknown_rule, "config.eval.keep_rules names no rule: 'objectnes'.*'objectness'"),
        (no_progress, "config.train.\\w+.log_every is 0 and must be at least 1"),
        (no_size, "short_side is 0"),
        (no_bank, "finetune.bank_images is 0; set --config.train.finetune.bank_images=32 "),
        (small_bank, "bank_images is 31; set --config.train.finetune.bank_images=32 \\(its batch"),
        (nothing_of_clip, "config.train.cat.takes.projector is 'clip', .*trains clip alone; name"),
        (nothing_to_fill, "In config.train.con.copies: There are no .* at 'segmentor/backbon' to"),
        (nothing_to_copy, "In config.train.con.copies: There are no parameters at 'generator/x'"),
        (unknown_captions, "config.train.clip.captions are 'sen'; did you mean 'seen'"),
        (oracle_of_real_data, "config.train.control.oracle needs images that show unseen classes"),
        (several_gammas, "settings.gamma is .0.0, 1.0. and must be one number"),
        (one_scene, "do not show both seen and unseen classes; set config.data.num_eval_images"),
        (no_scale, "SemanticProjector.initial_scale is 0.0 and must be above 0"),
        (no_temperature, "config.train.con.method.temperature is 0.0 and must be above 0"),
        (no_fold, "In config.train.cat.method: The regression's folds is 1 and must be at least 2"),
        (
            no_segmentor,
            "config.eval.stages names stage 'clip', which has no segmentor.* one of cat, con, ",
        ),
        (unread_clip, "config.init.clip is nothere, which no stage .*; leave it out"),
        (unread_words, "config.text.bpe_path is nothere, which no .*; leave it out"),
        (pictures_below_none, "config.eval.num_pictures is -1"),
        (no_training_of_it, "segmentor.kind is 'fcclip', which predicts and is not trained here"),
        (unknown_network_field, "config.model.generator has no key 'noise'.*'noise_width'"),
    ],
)
def test_a_mistake_in_a_late_stage_is_refused_before_the_first(spoil, sentence, tmp_path):
    config = demo_zps.get_config("smoke")
    with config.unlocked():
        spoil(config)
    with pytest.raises(ValueError, match=sentence):
        Experiment(config, tmp_path / "run", tiny.no_data(VOCABULARY))
    assert not (tmp_path / "run").exists()
