"""The largest relative difference to every golden file: ``python -m tests.golden_table``.

Runs the tests that compare the product with golden tensors, notes every difference that they take, and prints a table.
What is compared for equality (sizes, names, decisions) has no difference: it is equal, or its test fails.
"""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from tests import golden_autoencoders
from tests.conftest import ROOT


class Row(NamedTuple):
    """What is compared of a golden file."""

    file: str  # without suffix; a pattern of fnmatch, or several with ", " between
    what: str
    tests: tuple[str, ...]  # beginnings of pytest's names, below tests/unit


AUTOENCODERS = "test_golden_autoencoders.py::test_published_file"
STDIT = (
    *("stdit_v1_0", "stdit_v1_0_uncond_mask_repeat", "stdit_v1_2_xmask"),
    *("stdit2_v1_1", "stdit2_v1_1_qknorm_xmask", "stdit2_v1_2_qknorm_after_fix"),
    *("stdit3_v1_2", "stdit3_v1_2_xmask", "stdit3_v1_2_cached_text"),
    *("stdit3_v1_3_window_t2v", "stdit3_v1_3_window_i2v", "stdit3_v1_3_plain"),
)
STDIT_GOLDEN = "test_golden_stdit.py::test_output_loss_and_gradients"
AUTOENCODERS_1X = "test_golden_autoencoders_1x.py::test_"
TRAINING_1X = "test_golden_autoencoder_training_1x.py::test_"
SAMPLING = "test_golden_sampling.py::test_"
MODELS_V1 = "test_golden_models_v1.py::test_output_loss_and_gradients"
_TRAINED = "output, loss, gradients"
SCHEDULERS = "test_golden_schedulers.py::test_"
STRINGS = "test_placed_frames.py::test_"
ROWS = (
    *(
        Row(f"v1/{name}", _TRAINED, (f"{MODELS_V1}[{name}]",))
        for name in (
            *("dit_v1_0_text", "dit_v1_0_class", "latte_v1_0_text", "latte_v1_0_class"),
            *("pixart_v1_0", "pixart_v1_2_base_size", "pixart_ms_v1_0", "pixart_sigma_v1_2"),
        )
    ),
    Row("v1/names", "names and shapes of the real sizes", ("test_patch_weights.py::test_names_and_shapes",)),
    Row("hunyuan_vae", "encode and decode, whole and in tiles", (f"{AUTOENCODERS}[hunyuan_vae]",)),
    Row("hunyuan_vae", "the same from a diffusers folder", ("test_golden_autoencoders.py::test_hunyuan_from",)),
    Row("flux_ae", "encode and decode", (f"{AUTOENCODERS}[flux_ae]",)),
    Row("flux_ae", "the same from a diffusers folder", ("test_golden_autoencoders.py::test_flux_from",)),
    Row("video_dc_ae", "encode and decode, whole and in tiles", (f"{AUTOENCODERS}[video_dc_ae]",)),
    Row("vae_losses", "losses, gradients, moving average", ("test_autoencoder_losses.py::test_every_golden_loss",)),
    Row(
        "vae_training", "schedules, sizes of the discriminator", ("test_autoencoder_losses.py::test_every_golden_num",)
    ),
    Row("conditioning", "training, 8 kinds x 4 clips", ("test_references.py::test_training_conditions_are",)),
    Row("conditioning", "sampling, 8 kinds, causal or not", (f"{SAMPLING}conditions_of_sampling",)),
    Row("denoisers", "trajectories of guidance", ("test_golden_denoisers.py::test_every_step",)),
    Row("sampling_api", "noise to pixels", (f"{SAMPLING}from_noise_to_pixels",)),
    Row("sampling_api", "known frames, published noise", (f"{SAMPLING}known_frames", f"{SAMPLING}published_noise")),
    Row("packing", "tokens and positions", (f"{SAMPLING}packing",)),
    Row("sampling_tables", "schedules, noise of a seed", (f"{SAMPLING}schedules", f"{SAMPLING}noise_of_a_seed")),
    Row(
        "sampling_tables",
        "sizes, prompts, file names",
        (f"{SAMPLING}sizes", f"{SAMPLING}suffixes", f"{SAMPLING}file_names"),
    ),
    Row("text", "T5 and CLIP: token ids, features", ("test_text_files.py::test_features_and_tokens",)),
    Row("buckets", "buckets of 300 clips, 5 tables", ("test_published_rule.py::test_every_decision",)),
    Row("buckets", "frame rates, runs", ("test_published_rule.py::test_frame", "test_published_rule.py::test_a_run")),
    Row("v1/aspect_tables_*", "sizes, ratios, lengths by name", ("test_rule_1x.py::test_tables_of_sizes",)),
    Row("v1/aspect_tables_*", "sizes of sampled clips", ("test_rule_1x.py::test_sizes_of_sampled",)),
    Row("v1/buckets_*", "buckets of 150 clips, 5 tables", ("test_rule_1x.py::test_every_decision",)),
    Row("v1/mask_generator_*", "masks and probabilities", ("test_training_masks.py::test_distributions",)),
    Row("v1/mask_index_v1_3", "given frames", ("test_training_masks.py::test_frames_of_every_type",)),
    Row(
        "v1/configs",
        "clips, buckets, given frames of training",
        ("test_family_clips.py::test_clips_are", "test_family_clips.py::test_given_frames_are"),
    ),
    Row("v1/vae_spatial_*", "frames as images, runs of frames", (f"{AUTOENCODERS_1X}images",)),
    Row("v1/vae_temporal_decoder_v1_0", "decode a clip of images", (f"{AUTOENCODERS_1X}decoder_of_clips",)),
    Row("v1/vae_temporal_*v1_2", "moments, clips, frames that do not fit", (f"{AUTOENCODERS_1X}temporal_network[",)),
    Row("v1/vae_temporal_*v1_2", "a training step, gradients", (f"{AUTOENCODERS_1X}temporal_network_trains",)),
    Row("v1/vae_posterior_v1_2", "draws, KL, density", (f"{AUTOENCODERS_1X}posterior",)),
    Row("v1/vae_pipeline_v1_2", "encode and decode in pieces", (f"{AUTOENCODERS_1X}clips_of_1_2",)),
    Row("v1/vae_pipeline_more_v1_2", "other pieces, both networks in training", (f"{AUTOENCODERS_1X}more_of_1_2",)),
    Row(
        "v1/vae_v1_3_*",
        "encode and decode in pieces, normalized",
        (f"{AUTOENCODERS_1X}clips_of_1_3", f"{AUTOENCODERS_1X}small_values"),
    ),
    Row("v1/vae_stats_v1_3", "normalization", (f"{AUTOENCODERS_1X}statistics_of_1_3",)),
    Row("v1/vae_sizes_*", "sizes of latents", (f"{AUTOENCODERS_1X}sizes_that_are_stated",)),
    Row(
        "v1/vae_train_v1_2",
        "stages 1 to 3, discriminator, gradients",
        tuple(f"{TRAINING_1X}{name}" for name in ("stages", "generator_term", "step_of_the", "losses_of_logits")),
    ),
    Row("v1/vae_train_v1_3", "a training step, gradients", (f"{TRAINING_1X}training_step_of_1_3",)),
    Row(
        "v1/names_vae",
        "names and shapes of the published sizes",
        ("test_autoencoder_files.py::test_names_of_open_sora_1", f"{TRAINING_1X}discriminators_of_published"),
    ),
    Row("v1/configs", "values of 59 configurations", ("test_family_configs.py::test_values_are_the_published_ones",)),
    Row("v1/clean_caption", "captions, cleaned and lowered", ("test_text_1x.py::test_cleaning_is",)),
    *(
        Row(
            f"v1/inference_strings_v{release.replace('.', '_')}",
            what,
            tuple(f"{STRINGS}{name}[{release}]" for name in names),
        )
        for release in ("1.2", "1.3")
        for what, names in (
            (
                "mask strategies: parsed, applied",
                ("strategies_are_read_as_published", "strategies_are_applied_as_published"),
            ),
            ("alignment of frames", ("frames_are_aligned_as_published",)),
            ("parts of prompts by clip", ("parts_of_prompts_are_those_published",)),
            ("scores behind prompts", ("scores_are_written_as_published",)),
            ("JSON behind prompts", ("json_behind_prompts_is_read_as_published",)),
            ("names of files", ("files_are_called_as_published",)),
            ("size information", ("models_are_told_the_size_that_is_published",)),
        )
    ),
    Row("v1/inference_strings_v1_2", "frames at the head of a clip", (f"{STRINGS}frames_at_the_head",)),
    Row("v1/inference_strings_v1_3", "conditions of 1.3, 36 cases", (f"{STRINGS}kinds_of_1_3",)),
    Row("v1/iddpm_tables_*", "chains, 4 respacings, fp64 and fp32", (f"{SCHEDULERS}tables_are_equal",)),
    Row(
        "v1/iddpm_speed_*", "tables of SpeeD; loss, gradient", (f"{SCHEDULERS}speed_tables", f"{SCHEDULERS}iddpm_speed")
    ),
    Row("v1/iddpm_train_*", "losses, gradients, with masks", (f"{SCHEDULERS}iddpm_training",)),
    Row("v1/iddpm_sample_*, v1/iddpm_ddim_*", "DDPM and DDIM, with masks", (f"{SCHEDULERS}iddpm_sampling",)),
    Row("v1/iddpm_p_sample_*", "a step with clipping", (f"{SCHEDULERS}one_step",)),
    Row("v1/dpms_sample_*", "DPM-Solver++", (f"{SCHEDULERS}dpm_solver",)),
    Row("v1/rflow_timestep_transform_*", "times by size", (f"{SCHEDULERS}timestep_transform",)),
    Row("v1/rflow_train_*", "times, losses, gradients, with masks", (f"{SCHEDULERS}flow_training[",)),
    Row("v1/rflow_train_i2v_drop_*", "losses with dropped conditions", (f"{SCHEDULERS}flow_training_with",)),
    Row("v1/rflow_sample_*", "Euler steps, masks, three passes", (f"{SCHEDULERS}flow_sampling",)),
    Row("step_cache", "12 steps of every cache", ("test_step_caches.py::test_golden_trajectories",)),
    *(Row(f"v1/{name}", "output, loss, gradients", (f"{STDIT_GOLDEN}[{name}]",)) for name in STDIT),
    Row("v1/names", "STDiT: names, shapes, counts", ("test_stdit_files.py::test_names_and_shapes",)),
    Row("step_cache", "decisions of TeaCache", ("test_step_caches.py::test_golden_decisions",)),
)


class Recorder:
    """A plugin of pytest: results of the tests, and what ``relative`` of their modules gave in each."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}
        self.differences: dict[str, list[float]] = {}
        self._now = ""

    def pytest_collection_modifyitems(self, items: Sequence[Any]) -> None:
        """Every function ``relative`` is listened to."""
        modules: set[ModuleType] = {item.module for item in items} | {golden_autoencoders}
        for module in modules:
            if hasattr(module, "relative"):
                module.relative = self._heard(module.relative)

    def _heard(self, relative: Callable[..., float]) -> Callable[..., float]:
        def heard(*args: Any) -> float:
            found = relative(*args)
            self.differences.setdefault(self._now, []).append(found)
            return found

        return heard

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """The test that differences belong to from here on."""
        self._now = nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test that was skipped has not passed."""
        self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and report.passed


def table(recorder: Recorder) -> tuple[list[str], bool]:
    """Lines of a table in Markdown, and whether all was compared and is within its limit."""
    lines = ["| file | what | cases | numbers | largest relative difference |", "|---|---|---|---|---|"]
    all_good = True
    for row in ROWS:
        beginnings = tuple(f"tests/unit/{test}" for test in row.tests)
        ran = [name for name in recorder.passed if name.startswith(beginnings)]
        found = [difference for name in ran for difference in recorder.differences.get(name, [])]
        good = bool(ran) and all(recorder.passed[name] for name in ran)
        worst = f"{max(found):.1e}" if found else "equal"
        lines.append(f"| {row.file} | {row.what} | {len(ran)} | {len(found) or ''} | {worst if good else 'FAILED'} |")
        all_good &= good
    return lines, all_good


def main() -> int:
    """Prints the table; 1 if a test failed, was skipped, or is not there."""
    torch.set_num_threads(1)
    recorder = Recorder()
    names = sorted({f"{ROOT}/tests/unit/{test.split('[')[0].partition('::')[0]}" for row in ROWS for test in row.tests})
    chosen = {test.partition("::")[2].split("[")[0] for row in ROWS for test in row.tests}
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "-k", " or ".join(sorted(chosen)), *names], [recorder])
    lines, good = table(recorder)
    print("\n".join(lines))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
