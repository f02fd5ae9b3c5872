"""Mistakes made on purpose, and the test that finds each: ``python -m tests.mutations [--list] [part of a name ...]``.

Each row of ``TABLE`` replaces one piece of source in a copy of the project and runs one test there. The test must fail,
and by an assertion: a mistake that ends the program with an error of its own would be found without a test. A row whose
text is not in the file exactly once is an error, as it would prove nothing; so is a test that fails without a mistake.

A process that has imported torch once is forked for every row, so that a row takes as long as its test.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OURS = ("acceleration", "opensora", "data_pipeline", "scripts", "launch", "tests")
COPIED = (*OURS, "configs", "docs", "pyproject.toml")
LIMIT_S = 300.0  # for one test


@dataclass(frozen=True)
class Mutation:
    """One mistake."""

    name: str
    file: str
    old: str  # stands once in the file
    new: str
    test: str  # what must find it, as pytest names it


DIFFERENCES = "tests/unit/test_adapter_differences.py::test_"
TENSOR_CUT = "acceleration/sharding/tensor_parallel.py"
VIDEO_PLANS = "tests/unit/test_video_planner.py::test_{}"
NORMS_CUT = "tests/dist/test_tensor_norms.py::test_{}"
SHARED_INPUTS = "acceleration/sharding/shared_inputs.py"
SHARED_BY_HAND = "tests/dist/test_shared_inputs.py::test_{}"
LAYOUT_SEARCH = "tests/unit/test_layout_search.py::test_{}"
TEXT_FILES, RULE = "tests/unit/test_text_files.py", "tests/unit/test_published_rule.py"
RULE_1X, CLIPS_1X = "tests/unit/test_rule_1x.py", "tests/unit/test_clips_1x.py"
MASKS_1X, GIVEN_1X = "tests/unit/test_training_masks.py", "tests/unit/test_given_frames.py"
TRAIN = "tests/reference/test_training.py::test_one_process[adamw]"
SGD = "tests/reference/test_training.py::test_one_process[sgd, interleaved]"
OTHER = "tests/reference/test_training.py::test_one_process[other options]"
DRAWN = "tests/reference/test_training.py::test_one_process[drawn weights]"
FLUX = "tests/reference/test_training.py::test_one_process[flux layout]"
ORDER = "tests/unit/test_cost.py::test_steps_come_in_the_order_that_is_drawn"
EVEN = "tests/unit/test_cost.py::test_packs_cost_about_the_same[4]"
PACKS = "tests/reference/test_training.py::test_one_process[packs]"
DAMAGED = "tests/reference/test_training.py::test_one_process[damaged files]"
ADAPTERS = "tests/reference/test_training.py::test_one_process[adapters]"
FEATURES = "tests/reference/test_training.py::test_from_features"
RESUMED = "tests/reference/test_training.py::test_resumed"
TENSOR = "tests/reference/test_training.py::test_many_processes[2-tensor2]"
FOUR = "tests/reference/test_training.py::test_many_processes[4-tensor2-shard2-zero3]"
CLIPS = "tests/reference/test_sampling.py::test_clips[guided]"
DISTILLED = "tests/reference/test_sampling.py::test_clips[distilled]"
STILLS = "tests/reference/test_sampling.py::test_stills_of_a_table"
CAMERA, LUMA = "tests/unit/test_motion.py::test_{}", "tests/unit/test_luma.py::test_{}"
MEASURE = "tests/unit/test_measure.py::test_{}"
API, WEB = "tests/integration/test_service_api.py::test_", "tests/unit/test_serve_web.py::test_"
WHOLE = "tests/reference/test_sampling.py::test_from_training_to_pixels[adamw]"
WITH_ADAPTERS = "tests/reference/test_sampling.py::test_from_training_to_pixels[adapters]"

OWN_ADDRESSES, OWN_NETWORK, RANK_0, FINDING, STARTING = (
    f"acceleration/distributed/{name}.py"
    for name in ("addresses", "network", "rendezvous", "search", "launcher_variables")
)
QUEUES, QUEUE_TEST = "opensora/serve/queues", "tests/unit/test_serve_queue.py::"
PAGE = "opensora/serve/web/page"
PAGE_TEST, PAGE_ACCESS = (f"tests/integration/test_service_page{part}.py::test_{{}}" for part in ("", "_access"))
COORDINATOR, ORDERS = "launch/coordinator.py", "tests/unit/test_coordinator.py"
ADDRESS_TEST, CHOICE_TEST = (f"tests/unit/{name}.py::test_" for name in ("test_addresses", "test_network"))
MEETINGS = "tests/faults/test_meeting_fuzz.py::test_any_meeting_ends_in_one_of_two_ways"
UNIPC, FLOW_STEPS = "opensora/schedulers/flow_multistep.py", "tests/unit/test_flow_solvers.py::test_"
FLOW_TIMES = "tests/unit/test_rectified_flow.py::test_"
EXPERTS = "tests/dist/test_experts.py::test_"
WAN_VAE, WAN_TEXT = "tests/unit/test_wan_autoencoder.py::test_", "tests/unit/test_text_wan_hunyuan.py::test_"
PICTURE = "tests/unit/test_image_encoder.py::test_"
CLIP_REFERENCES = "tests/unit/test_clip_references.py::test_"
GARBAGE, BORDERS = "opensora/train/garbage_collection.py", "tests/unit/test_garbage_collection.py"
STEP, LOOP = "opensora/train/preparation.py", "opensora/train/loop.py"
SETUP, WEIGHTS, DATA = "opensora/train/setup.py", "opensora/assembly/initial_weights.py", "opensora/train/step_data.py"
ENCODERS = "opensora/assembly/encoders.py"
TOKEN_LAYOUT, DROPOUT = "opensora/assembly/token_layout.py", "opensora/conditioning/dropout.py"
EXPORT, RESUME = (f"opensora/train/state/{name}.py" for name in ("export", "resume"))
FLOW, TIMES, EULER = (f"opensora/schedulers/{name}.py" for name in ("rectified_flow", "timesteps", "euler"))
OPTIM, EMA, NATIVE = "acceleration/optim/optimizers.py", "acceleration/optim/ema.py", "acceleration/engines/native.py"
GUIDANCE, SOLVER, NOISE = (f"opensora/sampling/{name}.py" for name in ("guidance", "loop", "noise"))
MODEL, LAYERS = "opensora/models/mmdit/model.py", "opensora/models/mmdit/layers.py"
JOINT_BLOCKS, INITIAL = (f"opensora/models/layers/{name}.py" for name in ("joint_blocks", "init"))
REFINER, HUNYUAN_MODEL, HUNYUAN_FILES = (
    f"opensora/models/hunyuan_video/{name}.py" for name in ("refiner", "model", "convert")
)
HUNYUAN_TEST = "tests/unit/test_hunyuan_video{}.py::test_{}"
HUNYUAN_PARITY = HUNYUAN_TEST.format("_diffusers_parity", "output_and_every_gradient")
HUNYUAN_PACK = HUNYUAN_TEST.format("", "a_pack_equals_its_samples")
CONVERT = "opensora/models/mmdit/convert.py"
ROWS, READER, FIT = (f"opensora/models/weights/{name}.py" for name in ("rows", "reader", "adapter_fit"))
FILES = "tests/unit/test_weight_formats.py"
FP8 = "opensora/utils/files/fp8.py"
FP8_FORMS = "test_every_form_gives_the_numbers_that_decoding_by_hand_gives[wan original-4]"
FP8_DAMAGED = "test_damaged_files_are_refused_in_one_line"
ADAPTER_EXPORT = "opensora/models/weights/adapter_export.py"
ADAPTER_FORMATS, ADAPTER_FAMILIES = (f"tests/unit/test_adapter_{name}.py" for name in ("formats", "families"))
PLACED, PLACED_TEST = "opensora/conditioning/placed_frames.py", "tests/unit/test_placed_frames.py::test_"
LONG_CLIPS = "opensora/inference/opensora_1x/clips.py"
LONG_TEST = "tests/dist/test_long_clips.py::test_one_process_makes_what_the_formulas_say"
ROPE, EMBEDDING = "opensora/models/layers/rope.py", "opensora/models/layers/embedding.py"
DCT, BYTES = "opensora/models/vae/dct.py", "opensora/models/text/bytes.py"
HUNYUAN, HUNYUAN_AE, DC_AE, DC_AE_NETWORK, POSTERIOR, VAE_TILES, FLUX_NAMES, VAE_TABLE = (
    f"opensora/models/vae/{name}.py"
    for name in (
        "hunyuan_network",
        "hunyuan",
        "dc_ae",
        "dc_ae_network",
        "posterior",
        "tiles",
        "flux2d_names",
        "__init__",
    )
)
CODING = "opensora/planner/coding_memory.py"
HELD_OUT_LOSS, VALIDATION = "opensora/train/held_out.py", "tests/unit/test_validation.py::test_"
AE_LOSSES, LOSSES = "opensora/models/vae/training/losses.py", "tests/unit/test_autoencoder_losses.py::test_"
NETS, AE_FILES = "tests/unit/test_autoencoder_networks.py::test_", "tests/unit/test_autoencoder_files.py::test_"
TOKENS, PROMPT = "opensora/utils/tokens.py", "opensora/utils/prompt_suffix.py"
VIDEO, TRANSFORMS = (f"opensora/datasets/loading/{name}.py" for name in ("reader", "window"))
BUCKET = "opensora/datasets/buckets/bucket.py"
EPOCH, PLAN, BALANCE = (f"opensora/datasets/plan/{name}.py" for name in ("epoch", "batch_plan", "balance"))
LORA, STORED, PACKING = (
    "acceleration/lora.py",
    "opensora/datasets/loading/feature_store.py",
    "opensora/train/packed_tokens.py",
)
PIPELINE, FIND, LOAD, SAVE, PROMPTS = (
    f"opensora/inference/{name}.py" for name in ("pipeline", "find", "load", "save", "prompts")
)
SWITCH, LAYOUT = "acceleration/sequence/axis_switch.py", "acceleration/sequence/layout.py"
VOLUME, PROFILE, PROFILING, RANK = (
    f"acceleration/accounting/{name}.py" for name in ("comm_volume", "model_profile", "profiling", "rank_layout")
)
SWITCHED = "tests/dist/test_axis_switch.py::test_every_process_gets_its_part[2-mesh0]"
FACTORED = "tests/unit/test_factored.py::"
FRAMES, STATED = (
    FACTORED + f"test_{name}"
    for name in ("frames_are_exchanged_where_there_are_enough", "the_profile_states_slots_switches_and_order")
)
COUNTED = FACTORED + "test_layouts_of_any_size_count_on_the_meta_device_what_is_predicted[degrees1-full-fp64]"
PLACEMENT, HOST_TRAFFIC = "acceleration/distributed/placement.py", "acceleration/accounting/host_traffic.py"
NETWORK, LINKS = "opensora/planner/network.py", "tests/unit/test_host_traffic.py::"
FEWEST, BY_HAND, SPLIT = (
    "tests/unit/test_placement.py::test_no_arrangement_has_fewer_groups_across_hosts[8]",
    LINKS + "test_by_hand",
    LINKS + "test_within_hosts_and_between_them_is_all[factored]",
)
SAME_FILES = "opensora/train/state/same_files.py"
ELSEWHERE, BLIND, COMPARED = (
    f"tests/unit/test_same_files.py::test_{name}"
    for name in (
        "a_folder_that_another_run_holds_elsewhere_is_named",
        "who_sees_another_folder_is_named[nfs]",
        "every_difference_changes_what_is_compared",
    )
)
REFERENCES, CODES = "opensora/conditioning/references.py", "opensora/assembly/reference_codes.py"
LENGTHS, DENOISERS = "opensora/inference/lengths.py", "opensora/sampling/denoisers.py"
GIVEN, OPTIONS = "opensora/inference/references.py", "opensora/sampling/options.py"
REFERRED = "tests/reference/test_training.py::test_one_process[references]"
LEFT_OUT = "tests/reference/test_training.py::test_one_process[references left out]"
REFERRED_CLIPS = "tests/reference/test_sampling.py::test_references[guided]"
ROOM, BY_WEIGHT = (
    f"tests/unit/test_references.py::test_{name}"
    for name in ("room_for_a_kind", "kinds_are_drawn_by_weight_among_those_that_fit")
)
GIVEN_LOOP = "tests/unit/test_given_references.py::test_which_reference_a_kind_takes"
EVERY = "tests/unit/test_golden_sampling.py::test_known_frames_of_every_clip_are_put_back"
THREE_WAY = "tests/unit/test_golden_denoisers.py::test_every_step_is_the_published_one[i2v_plain]"
OPERATIONS = FACTORED + "test_operations_are_those_that_torch_counts[batch0]"

CACHED_BLOCKS, CACHED_ATTENTION, DECISIONS = (
    f"opensora/sampling/caches/{name}.py" for name in ("blocks", "attention", "decisions")
)
CACHES_ON_MESH, CACHES_DIST = (
    "opensora/assembly/step_caches.py",
    "tests/dist/test_step_caches.py::test_layouts_decide_and_sample_as_one_process",
)
CACHES_UNIT = "tests/unit/test_step_caches.py::"
REUSED, TEACACHE, MAGCACHE = (
    f"{CACHES_UNIT}test_blocks_are_reused_as_the_formulas_say[{name}]"
    for name in ("first_block", "teacache", "magcache, errors alone")
)
ANEW = f"{CACHES_UNIT}test_one_cache_serves_one_clip_after_another"
BAD_NUMBERS = f"{CACHES_UNIT}test_bad_numbers_are_never_a_reason_to_reuse"
PEAK_MEMORY, SAMPLING_FORECAST = "acceleration/accounting/peak_memory.py", "opensora/planner/sampling_forecast.py"
FORECAST_BYTES, FORECAST_TURNS = (
    f"tests/{name}.py::test_{{}}" for name in ("device/test_accounting", "unit/test_forecast_sampling")
)
TURNS, STREAMED = "opensora/assembly/turns.py", "acceleration/blocks/block_streaming.py"
STREAM_ORDER = "tests/unit/test_block_streaming.py::test_{}"
OFFLOADED = "tests/device/test_offload.py::test_clips_and_bytes[1-{}]"
STDIT, STDIT2, STDIT3, WINDOWS, STDIT_LAYERS, STDIT_FILES = (
    f"opensora/models/stdit/{name}.py" for name in ("stdit", "stdit2", "stdit3", "windows", "layers", "convert")
)
GOLDEN_STDIT = "tests/unit/test_golden_stdit.py::test_output_loss_and_gradients[{}]"
STDIT_START = "tests/unit/test_stdit_files.py::test_stdit3_starts_from_pixart_sigma_with_more_channels"
PYRAMID = f"{CACHES_UNIT}test_pyramid_attention_counts_calls_of_every_pass"
PYTHON_VALUES, MMENGINE = "opensora/config/python_values.py", "opensora/config/mmengine.py"
FAMILY_MODELS, FAMILY_JOBS, FAMILY_FLAGS = (f"opensora/config/family/{name}.py" for name in ("models", "jobs", "flags"))
PYTHON_FILES, SECOND = "tests/unit/test_python_configs.py::test_", "tests/unit/test_second_family_configs.py::test_"
GUIDE = "tests/unit/test_family_configs.py::test_the_guide_to_{}"

SINCOS, EMBEDDING, CAPTION = (f"opensora/models/layers/{name}.py" for name in ("sincos", "embedding", "caption"))
PATCHES, DIT_UNIT = "opensora/models/weights/patches.py", "tests/unit/test_dit_family.py::"
DIFFUSERS_DIT, PATCH_FILES = "tests/unit/test_diffusers_dit_parity.py::", "tests/unit/test_patch_weights.py::"
DIT_MODEL, LATTE_MODEL, PIXART_MODEL = (f"opensora/models/{name}/model.py" for name in ("dit", "latte", "pixart"))
WAN_SOURCE, WAN, WAN_FILES = "opensora/models/wan/{}.py", "tests/unit/test_wan.py::", "tests/unit/test_wan_files.py::"
RELATIVES = "tests/unit/test_relatives.py::test_"
WAN_PARITY = "tests/unit/test_wan_diffusers_parity.py::test_output_and_every_gradient[{}-dtype1-1e-08]"
CHAIN, DIFFUSION, IDDPM, DDPM, DPM, FLOW_V1 = (
    f"opensora/schedulers/{name}.py"
    for name in ("noise_schedule", "gaussian_diffusion", "iddpm", "ddpm", "dpm_solver", "rectified_flow_v1")
)
DIFFUSED, FLOWS, OF_V1 = (
    f"tests/unit/test_{name}.py::test_" for name in ("diffusion", "rectified_flow_v1", "guidance_v1")
)
WEIGHTED, DROPPED, EDITED, OF_STEPS = (
    "opensora/train/loss_weights.py",
    "opensora/conditioning/condition_dropout.py",
    "opensora/sampling/given_frames.py",
    "opensora/inference/steps.py",
)
ON_ONE = "tests/dist/test_sampling_v1.py::test_one_process_samples_what_the_formulas_say"

FUSED, NORMS, APEX = (f"acceleration/{name}.py" for name in ("optim/fused_adamw", "blocks/fused_norms", "nvidia_apex"))
BY_APEX = "tests/dist/test_apex.py::test_{}"
FAMILY_FILES = "tests/unit/test_family_configs.py::test_{}"
PARTS_OF_FILES = "tests/unit/test_family_parts.py::test_{}"

PIPELINE_LOCAL = "tests/unit/test_pipeline_local.py::test_"
FILTERS, REPORT, SCORES = (f"tests/unit/test_{name}.py::test_" for name in ("filters", "report", "scores"))

TABLE: tuple[Mutation, ...] = (
    Mutation(
        "a step at the boundary is of low noise where it is one bit below",
        "opensora/sampling/experts.py",
        "time >= boundary - ROUNDING",
        "time >= boundary",
        "tests/dist/test_experts.py::test_a_step_at_the_boundary_is_of_high_noise[euler-1]",
    ),
    # Files of Wan and HunyuanVideo as people have them.
    Mutation(
        "weights of a relative of Wan are sent for another size",
        "opensora/models/wan/convert.py",
        'return of_relative(names, _RELATIVES, "Wan T2V, I2V or TI2V")',
        "return None",
        RELATIVES + "weights_of_a_relative_are_named[wan-vace_blocks.0.before_proj.weight-Wan VACE-]",
    ),
    Mutation(
        "a pickle beside the folders of a pipeline hides them",
        "opensora/models/weights/shards.py",
        "inside = [name for name in OF_PIPELINES if (path / name).is_dir()]",
        "inside = [name for name in OF_PIPELINES if (path / name).is_dir() and not pickled]",
        RELATIVES + "a_published_folder_names_what_to_give[Wan2.1_VAE.pth-wan-inside0]",
    ),
    Mutation(
        "a bias of B is added without alpha/rank",
        "opensora/models/weights/adapters.py",
        'found[layer, "bias"] = _read(opened, name).double() * scales[layer]',
        'found[layer, "bias"] = _read(opened, name).double()',
        DIFFERENCES + "a_bias_of_b_is_scaled_as_its_product",
    ),
    Mutation(
        "rows of differences in the order of the file",
        "opensora/models/weights/adapter_fit.py",
        "made[rows.tensor][rows.indices()] = part",
        "made[rows.tensor][rows.start : rows.stop] = part",
        DIFFERENCES + "drawn_differences_are_read[wan]",
    ),
    Mutation(
        "adapters of a picture left out of a model that reads one",
        "opensora/models/weights/adapter_fit.py",
        "if pattern is None or any(re.search(pattern, layer) for layer in known):",
        "if pattern is None:",
        DIFFERENCES + "adapters_of_a_picture_are_left_out_where_none_is_read[release]",
    ),
    Mutation(
        "adapters of another model's patches are left out",
        "opensora/models/weights/adapter_fit.py",
        "if _reads_other_inputs(name, format) and layers[layer][1] == wanted[1]:",
        "if _reads_other_inputs(name, format):",
        DIFFERENCES + "patches_of_another_width_are_left_out",
    ),
    Mutation(
        "differences are not added where a model is loaded",
        "opensora/inference/load.py",
        "fsdp.add_differences(model, adapters.exported.differences, cfg.lora_scale)",
        "fsdp.add_differences(model, {}, cfg.lora_scale)",
        "tests/dist/test_adapter_swap.py::test_differences_are_added_as_they_are[1-mesh0]",
    ),
    Mutation(
        "differences are added without lora_scale",
        "opensora/inference/load.py",
        "fsdp.add_differences(model, adapters.exported.differences, cfg.lora_scale)",
        "fsdp.add_differences(model, adapters.exported.differences)",
        "tests/dist/test_adapter_swap.py::test_differences_are_added_as_they_are[1-mesh0]",
    ),
    Mutation(
        "differences of an earlier turn stay",
        "acceleration/sharding/adapter_swap.py",
        "                self._keep(one)\n",
        "",
        "tests/dist/test_adapter_swap.py::test_weights_are_those_of_a_model_built_with_them[1-mesh0-fp32]",
    ),
    Mutation(
        "norms of queries and keys change places in ComfyUI's files",
        "opensora/models/hunyuan_video/convert.py",
        '"q_norm.weight": "norm.query_norm.scale", "k_norm.weight": "norm.key_norm.scale"',
        '"k_norm.weight": "norm.query_norm.scale", "q_norm.weight": "norm.key_norm.scale"',
        "tests/unit/test_hunyuan_video_files.py::test_files_of_comfyui[small]",
    ),
    Mutation(
        "the config.json beside weights is not compared with the model",
        "opensora/models/families.py",
        "if found is None or type(found) is not type(cfg):",
        "if True:",
        "tests/unit/test_wan_files.py::test_a_given_shape_is_compared_with_the_folder[original]",
    ),
    Mutation(
        "experts that are swapped are taken",
        "opensora/inference/find.py",
        "if last <= boundary if one is high else first >= boundary:",
        "if last < 0:",
        "tests/unit/test_two_experts_found.py::test_experts_that_are_swapped_are_refused[0.875]",
    ),
    # The service's queue.
    Mutation(
        "the queue does not wait for the disk",
        f"{QUEUES}/sqlite.py",
        "synchronous = FULL",
        "synchronous = NORMAL",
        QUEUE_TEST + "test_every_change_is_synced",
    ),
    Mutation(
        "a worker that lost its lease writes",
        f"{QUEUES}/statements.py",
        "AND attempt = :attempt AND state",
        "AND state",
        QUEUE_TEST + "test_who_lost_the_lease_changes_nothing[sqlite]",
    ),
    Mutation(
        "one owner's jobs come first",
        f"{QUEUES}/statements.py",
        "jobs.priority DESC, COALESCE(owners.turn, 0), jobs",
        "jobs.priority DESC, jobs",
        QUEUE_TEST + "test_order_of_claims[sqlite]",
    ),
    Mutation(
        "a cancelled job runs again",
        f"{QUEUES}/statements.py",
        "state = CASE WHEN cancel_requested = 1 THEN 'cancelled' ELSE 'queued' END",
        "state = 'queued'",
        QUEUE_TEST + "test_a_cancelled_job_does_not_run_again[sqlite-put back]",
    ),
    Mutation(
        "what was put back counts",
        f"{QUEUES}/table_queue.py",
        "uncounted=1",
        "uncounted=0",
        QUEUE_TEST + "test_attempts[sqlite]",
    ),
    Mutation(
        "a job's place forgets whose turn it is",
        f"{QUEUES}/turns.py",
        "rounds + (index < mine)",
        "rounds",
        "tests/unit/test_serve_queue_model.py::test_any_history_is_that_of_the_model[sqlite-0]",
    ),
    Mutation(
        "damaged rows stay",
        f"{QUEUES}/damage.py",
        "return str(error)",
        "return None",
        "tests/faults/test_service_queue.py::test_what_is_said_of_damage['x']",
    ),
    # DiT, Latte, PixArt: positions, prompts that are dropped, files.
    Mutation(
        "rows before columns",
        SINCOS,
        "sincos(columns, dim // 2), sincos(rows, dim // 2)",
        "sincos(rows, dim // 2), sincos(columns, dim // 2)",
        DIFFUSERS_DIT + "test_pixart_equals_diffusers[False]",
    ),
    Mutation(
        "stills of DiT know a frame",
        DIT_MODEL,
        "if not self.cfg.no_temporal_pos_emb:",
        "if True:",
        DIFFUSERS_DIT + "test_dit_equals_diffusers",
    ),
    Mutation(
        "a dropped class is the first one",
        EMBEDDING,
        "torch.where(dropped, self.classes, label)",
        "torch.where(dropped, 0, label)",
        DIT_UNIT + "test_dropped_samples_do_not_know_their_prompts[dit_class]",
    ),
    Mutation(
        "frames of Latte enter with the tokens",
        LATTE_MODEL,
        "first = self.temporal_blocks[0] if len(self.temporal_blocks) else None",
        "first = self.spatial_blocks[0]",
        DIFFUSERS_DIT + "test_latte_equals_diffusers",
    ),
    Mutation(
        "frames of Latte enter at every block",
        LATTE_MODEL,
        "if block is first and frames is not None:",
        "if frames is not None:",
        DIFFUSERS_DIT + "test_latte_equals_diffusers",
    ),
    Mutation(
        "positions of PixArt are not stretched",
        PIXART_MODEL,
        "base = self._base(rows * columns)",
        "base = None",
        DIFFUSERS_DIT + "test_pixart_equals_diffusers[False]",
    ),
    Mutation(
        "aspect ratio is width by height",
        PIXART_MODEL,
        "conditions.size[:, :1] / conditions.size[:, 1:]",
        "conditions.size[:, 1:] / conditions.size[:, :1]",
        DIT_UNIT + "test_pixart_ms_is_told_height_by_width",
    ),
    Mutation(
        "coarser keys are not normalised",
        "opensora/models/pixart/layers.py",
        "self.norm(self.sr(planes.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))",
        "self.sr(planes.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)",
        DIT_UNIT + "test_coarser_keys_are_those_of_the_first_places[conv]",
    ),
    Mutation(
        "the norm of attention to the text keeps its number under diffusers' names",
        WAN_SOURCE.format("convert"),
        '"norm3": "norm2"',
        '"norm3": "norm3"',
        WAN_FILES + "test_names_and_shapes_are_those_of_diffusers[t2v]",
    ),
    Mutation(
        "channels of Wan's last layer stay where files have them",
        WAN_SOURCE.format("convert"),
        "order=channels_first(height(target.shape), patch)",
        "order=None",
        WAN_FILES + "test_what_is_written_is_read[None-original-t2v]",
    ),
    Mutation(
        "a config.json of Wan 2.1 is taken for one of 2.2",
        WAN_SOURCE.format("hub"),
        'image_dim = _image_dim(folder) if references == "clip" else 0',
        "image_dim = 0",
        WAN_FILES + "test_hub_folders_of_the_releases[i2v_14b-False]",
    ),
    Mutation(
        "times of Wan are those of the objective",
        WAN_SOURCE.format("model"),
        "times, row_of = LONGEST_TIME * t, None",
        "times, row_of = t, None",
        WAN + "test_times_go_up_to_a_thousand_and_text_has_zeros_for_a_mask",
    ),
    Mutation(
        "known frames of TI2V are at the time of the others",
        WAN_SOURCE.format("model"),
        "torch.cat((times, torch.zeros_like(times)))",
        "torch.cat((times, times))",
        WAN + "test_known_tokens_are_at_time_zero",
    ),
    Mutation(
        "the mask of known frames is behind their latents",
        WAN_SOURCE.format("model"),
        "torch.cat((mask.to(reference), reference), dim=-1)",
        "torch.cat((reference, mask.to(reference)), dim=-1)",
        WAN + "test_known_frames_are_channels_beside_the_noise[i2v]",
    ),
    Mutation(
        "Wan attends to text that a mask hides",
        WAN_SOURCE.format("model"),
        "if conditions.text_mask is not None:",
        "if False:",
        WAN + "test_times_go_up_to_a_thousand_and_text_has_zeros_for_a_mask",
    ),
    Mutation(
        "keys of a picture take the norm of those of text",
        WAN_SOURCE.format("layers"),
        "self.norm_k_img(self.k_img(image))",
        "self.norm_k(self.k_img(image))",
        WAN + "test_a_picture_is_read_beside_the_text",
    ),
    Mutation(
        "a picture is embedded by the other GELU",
        WAN_SOURCE.format("layers"),
        "            nn.GELU(),",
        '            nn.GELU(approximate="tanh"),',
        WAN_PARITY.format("i2v_picture"),
    ),
    Mutation(
        "the MLP of Wan takes the gate of attention",
        WAN_SOURCE.format("layers"),
        "torch.addcmul(x, gate_ffn, self.ffn(h)",
        "torch.addcmul(x, gate, self.ffn(h)",
        WAN_PARITY.format("t2v"),
    ),
    Mutation(
        "tokens of Wan are rounded between layers",
        WAN_SOURCE.format("layers"),
        "self.ffn(h).to(x.dtype))",
        "self.ffn(h).to(x.dtype)).to(dtype)",
        WAN + "test_tokens_times_and_angles_stay_exact_in_bf16",
    ),
    Mutation(
        "a null text begins anew behind its end",
        CAPTION,
        ".clamp(max=self.y_embedding.shape[0] - 1)",
        " % self.y_embedding.shape[0]",
        DIT_UNIT + "test_the_null_text_beyond_its_rows_repeats_the_last",
    ),
    Mutation(
        "the first row of a file's null text is repeated",
        PATCHES,
        "(Rows(name, found - 1, found),)",
        "(Rows(name, 0, 1),)",
        PATCH_FILES + "test_the_null_text_is_as_long_as_the_models_texts[4]",
    ),
    Mutation(
        "places of a patch change their order in files",
        PATCHES,
        ".transpose(3, 0, 1, 2)",
        ".transpose(3, 0, 2, 1)",
        PATCH_FILES + "test_published_channels_of_a_token_come_last",
    ),
    Mutation(
        "what is frozen is not exported",
        "acceleration/engines/native.py",
        "(trained | self.frozen).items()",
        "trained.items()",
        "tests/dist/test_chapters.py::test_what_is_not_trained_is_saved_and_exported[dit]",
    ),
    # Objectives and solvers of Open-Sora 1.x.
    Mutation(
        "respacing starts every section at 0",
        "opensora/utils/respacing.py",
        "start += length",
        "start += 0",
        DIFFUSED + "respacing_chooses_by_sections_and_by_distance",
    ),
    Mutation(
        "betas of left-out steps lost",
        CHAIN,
        "betas = 1 - whole / np.concatenate((np.ones(1), whole[:-1]))",
        "betas = betas_of(beta_schedule, steps)[chosen]",
        DIFFUSED + "a_chain_of_some_steps_has_the_noise_of_the_whole_one_there",
    ),
    Mutation(
        "posterior mean without x_t's part",
        CHAIN,
        "(1 - before) * xp.sqrt(1 - betas) / (1 - abar)",
        "(1 - before) * xp.sqrt(1 - betas)",
        DIFFUSED + "ddpm_keeps_the_distribution_in_every_step[50]",
    ),
    Mutation(
        "a learned variance upside down",
        DIFFUSION,
        "share * most + (1 - share) * least",
        "share * least + (1 - share) * most",
        DIFFUSED + "loss_by_hand[400-options0]",
    ),
    Mutation(
        "the bound in nats",
        DIFFUSION,
        "return terms / math.log(2)",
        "return terms",
        DIFFUSED + "loss_by_hand[1-options0]",
    ),
    Mutation(
        "bins of half the width", DIFFUSION, "BIN = 1 / 255", "BIN = 1 / 510", DIFFUSED + "loss_by_hand[0-options0]"
    ),
    Mutation(
        "the bound moves the mean",
        IDDPM,
        "prediction[..., : wanted.shape[-1]].detach(), prediction",
        "prediction[..., : wanted.shape[-1]], prediction",
        DIFFUSED + "the_bound_moves_the_variance_alone",
    ),
    Mutation(
        "known latents are quite clean",
        IDDPM,
        "schedule.noised(x0, noise, 0), x)",
        "x0, x)",
        DIFFUSED + "known_latents_have_the_noise_of_the_first_step",
    ),
    Mutation(
        "SpeeD without its mirror",
        IDDPM,
        "if rng.random() < 0.5 else index",
        "if rng.random() < 0.0 else index",
        DIFFUSED + "speed_draws_by_its_table_and_its_mirror",
    ),
    Mutation(
        "DDPM's deviation is its variance",
        DDPM,
        "(0.5 * found.log_variance)",
        "found.log_variance",
        DIFFUSED + "ddpm_keeps_the_distribution_in_every_step[50]",
    ),
    Mutation(
        "DDIM draws without making room",
        DDPM,
        "(1 - before - sigma**2).sqrt()",
        "(1 - before).sqrt()",
        DIFFUSED + "a_step_of_ddim_is_that_of_diffusers[0.7]",
    ),
    Mutation(
        "given frames of a chain a step late",
        DDPM,
        "noisy=first > level",
        "noisy=first >= level",
        DIFFUSED + "given_frames_of_a_chain",
    ),
    Mutation(
        "DPM-Solver of first order",
        DPM,
        "h / (2 * (now.log_snr - earlier.log_snr)) * (x0",
        "0 * h / (2 * (now.log_snr - earlier.log_snr)) * (x0",
        DIFFUSED + "ddim_and_dpm_solver_follow_the_flow_by_their_orders",
    ),
    Mutation(
        "DPM-Solver forgets the noise it keeps",
        DPM,
        "then.sigma / now.sigma * x",
        "now.sigma / then.sigma * x",
        DIFFUSED + "one_point_is_found_in_any_number_of_steps[2-dpm_solver]",
    ),
    Mutation(
        "an expert's draws end elsewhere",
        "opensora/schedulers/timesteps.py",
        "least + (most - least) *",
        "(most - least) *",
        FLOW_TIMES + "times_of_a_range_by_formula[logit-normal]",
    ),
    Mutation(
        "an expert's range is taken before the shift",
        "opensora/schedulers/rectified_flow.py",
        "time_shift(1 / alpha, torch",
        "time_shift(1.0, torch",
        "tests/reference/test_training.py::test_one_process[an expert's times]",
    ),
    Mutation(
        "a picture is repeated, not followed by grey",
        "opensora/conditioning/references.py",
        "grey = head.new_zeros(*head.shape[:-3], frames - head.shape[-3], *head.shape[-2:])",
        "grey = head[..., -1:, :, :].expand(*head.shape[:-3], frames - head.shape[-3], *head.shape[-2:])",
        CLIP_REFERENCES + "training_gives_the_first_frame_and_grey_as_one_clip_by_its_mode",
    ),
    Mutation(
        "a clip with grey is known where it is not",
        "opensora/inference/references.py",
        "return self.reference if self.whole else",
        "return self.reference if False else",
        CLIP_REFERENCES + "sampling_from_a_picture[4.0-clip]",
    ),
    Mutation(
        "known frames are noisy after the first step",
        "opensora/sampling/given_frames.py",
        "return self._kept(x, known), known",
        "return self._kept(x, known) if index == 0 else x, known",
        CLIP_REFERENCES + "sampling_from_a_picture[4.0-in_place]",
    ),
    Mutation(
        "the step at the boundary is the second expert's",
        "opensora/sampling/experts.py",
        'time >= boundary - ROUNDING else "low"',
        'time > boundary + ROUNDING else "low"',
        EXPERTS + "which_expert_a_step_is_for",
    ),
    Mutation(
        "the second expert is guided like the first",
        "opensora/sampling/experts.py",
        'option.guidance_low if expert == "low" and',
        "option.guidance_low if False and",
        EXPERTS + "two_experts_make_what_a_loop_makes[1]",
    ),
    Mutation(
        "the first expert makes all steps",
        "opensora/inference/steps.py",
        'return parts.low_noise.model if expert == "low" and',
        "return parts.low_noise.model if False and",
        EXPERTS + "two_experts_make_what_a_loop_makes[1]",
    ),
    Mutation(
        "UniPC corrects with one weight",
        UNIPC,
        "return a, b_1 - a",
        "return 0.0, b_1",
        FLOW_STEPS + "steps_by_formula[9-unipc]",
    ),
    Mutation(
        "UniPC corrects from where it arrived",
        UNIPC,
        "return self._moved(last.x, last.x0, index - 1, of_before",
        "return self._moved(self._past[-2].x, last.x0, index - 1, of_before",
        FLOW_STEPS + "steps_by_formula[9-unipc]",
    ),
    Mutation(
        "flow solvers begin at another time",
        UNIPC,
        "START = 0.999",
        "START = 0.9995",
        FLOW_STEPS + "unipc_is_that_of_diffusers[5]",
    ),
    Mutation(
        "DPM-Solver's last step of few is of second order", DPM, "steps < FEW and", "steps < 0 and", ON_ONE + "[dpm]"
    ),
    Mutation(
        "1.2 counts frames as 1.3",
        FLOW_V1,
        "frames // 17 * 5 if",
        "(frames - 1) // 4 if",
        FLOWS + "transform_by_hand[groups]",
    ),
    Mutation(
        "1.3 scales images",
        FLOW_V1,
        "sampling and is_video if",
        "sampling if",
        FLOWS + "transform_by_hand[images]",
    ),
    Mutation(
        "the velocity points to the noise",
        FLOW_V1,
        '{"velocity": x0 - noise}',
        '{"velocity": noise - x0}',
        FLOWS + "path_and_target_by_hand",
    ),
    Mutation(
        "known latents of a flow are noisy",
        FLOW_V1,
        "torch.where(known[:, None], x0, x)",
        "torch.where(known[:, None], x, x)",
        FLOWS + "known_latents_are_clean",
    ),
    Mutation(
        "frames are noised again in every step",
        EULER,
        "renoised=noisy & ~before",
        "renoised=noisy",
        FLOWS + "given_frames_of_a_flow",
    ),
    Mutation(
        "a flow's steps are too long",
        EULER,
        "(self.times[index] - self.times[index + 1]) / self.pure_noise",
        "(self.times[index] - self.times[index + 1]) / 999",
        FLOWS + "one_point_is_found_in_any_number_of_steps",
    ),
    Mutation(
        "all channels guided",
        GUIDANCE,
        "cond, uncond = (found[..., : self.guided] for",
        "cond, uncond = (found for",
        OF_V1 + "channels_beyond_the_guided_ones_stay_those_of_the_prompt[3]",
    ),
    Mutation(
        "contrast of this process's tokens",
        GUIDANCE,
        "sums = total(torch",
        "sums = alone(torch",
        OF_V1 + "the_flaw_fix_sums_over_the_processes_of_a_sample",
    ),
    Mutation(
        "contrast moved back entirely",
        GUIDANCE,
        "FLAW_FIX = 0.7",
        "FLAW_FIX = 1.0",
        OF_V1 + "the_flaw_fix_is_of_whole_samples",
    ),
    Mutation(
        "scaled image guidance falls too late",
        GUIDANCE,
        "max(steps - 1, 1))",
        "steps)",
        OF_V1 + "the_image_scale_grows_along_the_clip_and_falls_over_the_steps",
    ),
    Mutation(
        "edited frames are clean to the model",
        EDITED,
        "known=~edits.noisy",
        "known=edits.kept | ~edits.renoised",
        OF_V1 + "edited_frames_are_noised_told_and_put_back",
    ),
    Mutation(
        "kept frames are lost",
        EDITED,
        "return torch.where(kept[..., None], before, x)",
        "return x",
        OF_V1 + "edited_frames_are_noised_told_and_put_back",
    ),
    Mutation(
        "cfg_channel counts values of a token",
        OF_STEPS,
        "* prod(denoising.patch)",
        "* 1",
        OF_V1 + "latent_channels_are_those_of_tokens_and_outputs",
    ),
    Mutation(
        "samples weigh as if nothing were left out",
        WEIGHTED,
        "learned = ~known if",
        "learned = torch.ones_like(known) if",
        OF_V1 + "the_mean_over_samples_is_that_of_the_means_of_samples[objective0]",
    ),
    Mutation(
        "means of samples over latent values",
        DATA,
        'if self._reduction == "elements" else',
        'if self._reduction != "" else',
        OF_V1 + "a_step_says_what_its_loss_is_the_mean_over[samples-4]",
    ),
    Mutation(
        "frames beside known ones are not weighed up",
        DROPPED,
        "(1 - share * weight) / (1 - share)",
        "(1 - share) / (1 - share)",
        OF_V1 + "known_frames_weigh_as_they_are_told_and_the_mean_is_one",
    ),
    Mutation(
        "dropped text and reference mixed up",
        DROPPED,
        '"cond": Drop(text=True, reference=False)',
        '"cond": Drop(text=False, reference=True)',
        OF_V1 + "conditions_are_dropped_by_their_weights",
    ),
    # Configuration files in Python, and those of the Open-Sora family.
    Mutation(
        "a call of anything is a mapping",
        PYTHON_VALUES,
        'isinstance(node.func, ast.Name) and node.func.id == "dict")',
        "isinstance(node.func, ast.Name))",
        PYTHON_FILES + "everything_else_is_refused_in_one_line_and_nothing_is_run[call]",
    ),
    Mutation(
        "whole division as division",
        PYTHON_VALUES,
        "ast.FloorDiv: operator.floordiv",
        "ast.FloorDiv: operator.truediv",
        PYTHON_FILES + "files_by_a_grammar_and_their_mutations",
    ),
    Mutation(
        "lists of names are not counted",
        PYTHON_VALUES,
        "self.count(node, size_of(value) - 1)",
        "self.count(node, 0)",
        PYTHON_FILES + "everything_else_is_refused_in_one_line_and_nothing_is_run[lists of lists]",
    ),
    Mutation(
        "_delete_ deletes nothing",
        MMENGINE,
        "anew = _delete_of(new, path, lines)",
        "anew = _delete_of(new, path, lines) and False",
        PYTHON_FILES + "files_build_on_others",
    ),
    Mutation(
        "bases from anywhere",
        MMENGINE,
        'or not _resolved(target, f"{said}: cannot be read").is_relative_to(tree)',
        "",
        PYTHON_FILES + "bases_below_the_folder_of_all_configurations",
    ),
    Mutation(
        "what is on or off by its truth",
        "opensora/config/family/booleans.py",
        '"""\n    wanted = "must be True or False"\n    for key in BOOLEANS:',
        '"""\n    wanted = "must be True or False"\n    for key in ():',
        "tests/unit/test_family_booleans.py::test_a_text_or_a_number_is_neither_on_nor_off[grad_checkpoint]",
    ),
    Mutation(
        "no means yes",
        "opensora/config/family/booleans.py",
        '**dict.fromkeys(("no", "false", "f", "n", "0"), False)',
        '**dict.fromkeys(("no", "false", "f", "n", "0"), True)',
        "tests/unit/test_family_booleans.py::test_words_of_the_command_line[--flash-attn]",
    ),
    Mutation(
        "True processes",
        "opensora/config/family/jobs.py",
        "isinstance(value, int) and not isinstance(value, bool) and value >= 1",
        "isinstance(value, int) and value >= 1",
        "tests/unit/test_family_booleans.py::test_counts_are_whole_numbers[sp_size-True]",
    ),
    Mutation(
        "_delete_ of a whole file passes",
        "opensora/config/mmengine.py",
        "    if DELETE in own:",
        "    if DELETE not in own and DELETE in merged:",
        "tests/unit/test_python_configs.py::test_bases_that_are_refused",
    ),
    *(
        Mutation(what, file, source, change, f"tests/unit/test_fp8_weights.py::{test}")
        for what, file, source, change, test in (
            ("fp8 without its scale", READER, "self.scales.get(name), index", "None, index", FP8_FORMS),
            ("scales of rows from the first row on", READER, "index[0].start if index else 0", "0", FP8_FORMS),
            ("scales of fp8 divide", FP8, "found.mul_(scale)", "found.div_(scale)", FP8_FORMS),
            (
                "a lost scale is 1",
                FP8,
                "and name not in scales and len",
                "and False and len",
                f"{FP8_DAMAGED}[no scale]",
            ),
            ("a scale of 0", FP8, "(values > 0)", "(values >= 0)", f"{FP8_DAMAGED}[zero]"),
            (
                "rotated values",
                FP8,
                "if value and key not in",
                "if False and key not in",
                f"{FP8_DAMAGED}[rotated]",
            ),
            (
                "fp8 is written in fp32",
                "opensora/assembly/conversion.py",
                "if name in from_fp8 else",
                "if False else",
                "test_conversion_writes_bf16_and_leaves_other_types_alone[wan original]",
            ),
            (
                "scales of a part that is not read",
                READER,
                "if fp8.weight_of(name) in skipped}",
                "if False}",
                "test_the_text_encoder_as_comfyui_has_it",
            ),
        )
    ),
    Mutation(
        "options beside weights are programs",
        "opensora/models/weights/torch_files.py",
        "_INERT = (argparse.Namespace,)",
        "_INERT = ()",
        "tests/unit/test_weight_formats.py::test_options_beside_weights_are_read_and_run_nothing",
    ),
    Mutation(
        "the first set of published files",
        "opensora/utils/files/published_files.py",
        "key=lambda found: len(models[found[0]])",
        "key=lambda found: 0",
        "tests/unit/test_download.py::test_the_command_that_is_told_brings_the_smallest_set_to_the_path[text-encoders]",
    ),
    Mutation(
        "zips only",
        "opensora/models/weights/torch_files.py",
        "startswith((_ZIP, _OLD))",
        "startswith(_ZIP)",
        "tests/unit/test_weight_formats.py::test_files_of_torch_save_before_they_were_zips",
    ),
    Mutation(
        "a folder that no download fills",
        "opensora/utils/files/published_files.py",
        "[] if to / place == _whole(path) else",
        "[] if to else",
        "tests/unit/test_download.py::test_the_table",
    ),
    Mutation(
        "width before height",
        FAMILY_JOBS,
        't.put("sampling.height", size[0], "image_size")',
        't.put("sampling.height", size[1], "image_size")',
        "tests/unit/test_family_flags.py::test_flags_of_the_family[height]",
    ),
    Mutation(
        "frames per second of every interval",
        FAMILY_JOBS,
        't.put("sampling.fps", fps, "fps")',
        "None",
        GUIDE.format("sampling"),
    ),
    Mutation(
        "no prompt is dropped that was",
        FAMILY_MODELS,
        'dropped = t.get("model.class_dropout_prob", 0.1)',
        'dropped = t.get("model.class_dropout_prob", 0.0)',
        GUIDE.format("training"),
    ),
    Mutation(
        "names outside a section lose",
        FAMILY_FLAGS,
        'tree["sampling_option"][name] = tree.pop(name)',
        "tree.pop(name)",
        SECOND + "aliases_and_overrides",
    ),
    # A step of training: what is encoded, dropped, corrupted, and how it is weighed.
    Mutation("mask of a dropped prompt kept", STEP, "null.mask, mask)", "mask, mask)", TRAIN),
    Mutation("tokens and pooled text dropped together", STEP, "torch.where(drop_vec[", "torch.where(drop_txt[", TRAIN),
    Mutation(
        "noise of step 0 always", STEP, "draw_per_sample(self.seed, step,", "draw_per_sample(self.seed, 0,", TRAIN
    ),
    Mutation("times of step 0 always", STEP, "times)(self.seed, step,", "times)(self.seed, 0,", TRAIN),
    Mutation("pixels from 0 to 1", ENCODERS, ".float() / 127.5 - 1", ".float() / 255", TRAIN),
    Mutation(
        "target of the other sign",
        STEP,
        "{name: self.layout.patchify(target)",
        "{name: -self.layout.patchify(target)",
        TRAIN,
    ),
    Mutation("patch 1 in the shift", STEP, "step, ids, grid)", "step, ids, grid._replace(patch=(1, 1, 1)))", TRAIN),
    Mutation("guidance of zeros", STEP, "torch.ones_like(t)", "torch.zeros_like(t)", TRAIN),
    Mutation(
        "time coordinate lost",
        TOKEN_LAYOUT,
        "grid.patch, device).expand(",
        "grid.patch, device).mul(torch.tensor([0.0, 1.0, 1.0])).expand(",
        TRAIN,
    ),
    Mutation("AdamW becomes Adam with L2", OPTIM, "else torch.optim.AdamW", "else torch.optim.Adam", TRAIN),
    Mutation("crop left keyed as crop top", TRANSFORMS, 'epoch, "crop left"', 'epoch, "crop top"', TRAIN),
    Mutation("v_mlp cut as one part", MODEL, '("column", (heads, inner))', '("column", ((5 * hidden, 1),))', TENSOR),
    Mutation(
        "learning rate of the next step", LOOP, "set_lr(run.lr_at(run.step))", "set_lr(run.lr_at(run.step + 1))", TRAIN
    ),
    Mutation("dropout of step 0 always", STEP, "drop_text(self.seed, step,", "drop_text(self.seed, 0,", TRAIN),
    Mutation("condition of ones", MODEL, "torch.zeros(*tokens.x", "torch.ones(*tokens.x", TRAIN),
    Mutation("repeated micro-batches count", STEP, "* (tokens.weight / global", "* (1.0 / global", FOUR),
    Mutation("loss of the last micro-batch only", LOOP, "loss += share.detach()", "loss = share.detach()", TRAIN),
    Mutation("mean over a wrong number of values", DATA, "samples * self._latents(", "self._latents(", TRAIN),
    # The objective.
    Mutation("dropout by the square of its probability", DROPOUT, ".random() < p ", ".random() < p * p ", TRAIN),
    Mutation(
        "noise left in the data forgotten",
        FLOW,
        "(1 - (1 - self.cfg.sigma_min) * (1 - at)) * noise",
        "at * noise",
        TRAIN,
    ),
    Mutation(
        "noise left in the data not in the target", FLOW, "(1 - self.cfg.sigma_min) * noise - x0", "noise - x0", TRAIN
    ),
    Mutation("shift without latent frames", TIMES, "(4096 - 256)) * math.sqrt(latent_frames)", "(4096 - 256))", TRAIN),
    Mutation("shift from 0 tokens on", TIMES, "/ (4096 - 256)", "/ 4096", TRAIN),
    Mutation("uniform times", TIMES, "torch.sigmoid(draw_per_sample(", "torch.special.ndtr(draw_per_sample(", TRAIN),
    # Optimizer, schedule, average.
    Mutation("average keeps too little", EMA, "self.shadow], 1 - decay)", "self.shadow], decay)", TRAIN),
    Mutation("average warms up one step early", OPTIM, "(1 + step) / (10 + step)", "(2 + step) / (11 + step)", TRAIN),
    Mutation("average without warm-up", OPTIM, "if cfg.ema_warmup else", "if False else", TRAIN),
    Mutation(
        "average of weights before the update",
        NATIVE,
        "(self.host or self.optimizer).step()\n        if self.ema:\n"
        "            self.ema.update(self.master_params(), ema_decay_at(step, self.optim))",
        "if self.ema:\n            self.ema.update(self.master_params(), ema_decay_at(step, self.optim))\n"
        "        (self.host or self.optimizer).step()",
        TRAIN,
    ),
    Mutation("clipping off", NATIVE, "if self.optim.clip_norm:", "if False:", TRAIN),
    Mutation("clipping to one always", NATIVE, "self.optim.clip_norm, norm)", "1.0, norm)", TRAIN),
    Mutation("warm-up from zero", OPTIM, "cfg.lr * (step + 1) /", "cfg.lr * step /", TRAIN),
    Mutation("cosine over all steps", OPTIM, "max(1, total_steps - cfg.warmup_steps)", "max(1, total_steps)", TRAIN),
    Mutation("cosine ends at zero", OPTIM, "cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5", "cfg.lr * 0.5", TRAIN),
    Mutation("betas of the default", OPTIM, "betas=cfg.betas, ", "", TRAIN),
    Mutation("eps of the default", OPTIM, "eps=cfg.eps, ", "", TRAIN),
    Mutation(
        "SGD without decay",
        OPTIM,
        "SGD(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)",
        "SGD(parameters, lr=cfg.lr)",
        SGD,
    ),
    Mutation("weights drawn twice as large", INITIAL, "math.sqrt(3.0 / tensor", "math.sqrt(12.0 / tensor", DRAWN),
    Mutation(
        "weights drawn without the seed",
        WEIGHTS,
        'torch_generator(cfg.seed, "init", name))  #',
        'torch_generator(0, "init", name))  #',
        DRAWN,
    ),
    # The model and the encoders.
    Mutation("rotary positions of one axis", ROPE, "ids[..., axis, None]", "ids[..., 0, None]", TRAIN),
    Mutation(
        "rotary frequencies over the whole head",
        ROPE,
        "dtype=ids.dtype) / dim",
        "dtype=ids.dtype) / sum(axes_dim)",
        TRAIN,
    ),
    Mutation(
        "half-split pairs turned backwards",
        ROPE,
        "dim=-1), torch.cat((-sin, sin), dim=-1)",
        "dim=-1), torch.cat((sin, -sin), dim=-1)",
        TRAIN,
    ),
    Mutation("interleaved pairs turned backwards", ROPE, "torch.stack((cos, sin)", "torch.stack((cos, -sin)", SGD),
    Mutation(
        "interleaved pairs turned backwards in real numbers",
        ROPE,
        "pairs.flip(-1) * torch.cat((-sin, sin), dim=-1)",
        "pairs.flip(-1) * torch.cat((sin, -sin), dim=-1)",
        "tests/unit/test_rope.py::test_both_forms_have_the_same_bits",
    ),
    Mutation(
        "complex numbers in a graph",
        ROPE,
        " and not torch.compiler.is_compiling()",
        "",
        "tests/unit/test_rope.py::test_graphs_hold_no_complex_number",
    ),
    Mutation(
        "complex numbers on a device",
        ROPE,
        'pairs.device.type == "cpu" and not',
        "not",
        "tests/unit/test_rope.py::test_a_device_gets_real_numbers",
    ),
    Mutation("times not scaled", EMBEDDING, "scale: float = 1000.0", "scale: float = 1.0", TRAIN),
    Mutation("sine before cosine", EMBEDDING, "(angles.cos(), angles.sin())", "(angles.sin(), angles.cos())", TRAIN),
    Mutation(
        "padding in the mean of the text",
        REFINER,
        "(text * counts[..., None]).sum(dim=1)",
        "text.sum(dim=1)",
        HUNYUAN_PARITY,
    ),
    Mutation(
        "gates of the refiner swapped",
        REFINER,
        "attention_gate, mlp_gate = over_tokens",
        "mlp_gate, attention_gate = over_tokens",
        HUNYUAN_PARITY,
    ),
    Mutation(
        "a sample without any text sees none",
        REFINER,
        "(mask | begins)",
        "mask",
        HUNYUAN_TEST.format("", "every_text_token_sees_one"),
    ),
    Mutation(
        "text refined with that of other samples",
        REFINER,
        "(sample_of[:, :, None] == sample_of[:, None, :])",
        "(sample_of[:, :, None] >= 0 * sample_of[:, None, :])",
        HUNYUAN_PACK,
    ),
    Mutation(
        "mask of refined text behind the image",
        HUNYUAN_MODEL,
        "torch.cat((mask, mask.new_ones(img.shape[:2])), dim=1)",
        "torch.cat((mask.new_ones(img.shape[:2]), mask), dim=1)",
        HUNYUAN_PARITY,
    ),
    Mutation(
        "all of the text on every process",
        HUNYUAN_MODEL,
        'slice(*(getattr(context, "text", None) or (None,)))',
        "slice(None)",
        HUNYUAN_TEST.format("", "a_process_goes_on_with_its_part_of_the_text"),
    ),
    Mutation(
        "guidance not scaled",
        HUNYUAN_MODEL,
        "guidance * TIMES",
        "guidance",
        HUNYUAN_TEST.format("", "times_and_guidance_are_scaled_by_a_thousand"),
    ),
    Mutation(
        "halves of the last modulation as in the other file",
        HUNYUAN_FILES,
        "(rows.part(half, rows.count), rows.part(0, half))",
        "(rows.part(0, half), rows.part(half, rows.count))",
        HUNYUAN_TEST.format("_files", "what_diffusers_has_apart_and_in_another_order"),
    ),
    Mutation(
        "text mask behind the image",
        MODEL,
        "torch.cat((txt_mask, txt_mask.new_ones(img.shape[:2])), dim=1)",
        "torch.cat((txt_mask.new_ones(img.shape[:2]), txt_mask), dim=1)",
        TRAIN,
    ),
    Mutation(
        "gates swapped in double blocks",
        JOINT_BLOCKS,
        "_, _, attention_gate, shift, scale, mlp_gate = parts",
        "_, _, mlp_gate, shift, scale, attention_gate = parts",
        TRAIN,
    ),
    Mutation(
        "scale and shift swapped in the last layer",
        JOINT_BLOCKS,
        "shift, scale = over_tokens(",
        "scale, shift = over_tokens(",
        TRAIN,
    ),
    Mutation("exact GELU in single blocks", JOINT_BLOCKS, 'gelu(inner, approximate="tanh")', "gelu(inner)", TRAIN),
    Mutation(
        "tokens packed position by position",
        TOKENS,
        '"b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)"',
        '"b c (t pt) (h ph) (w pw) -> b (t h w) (pt ph pw c)"',
        TRAIN,
    ),
    Mutation("latents of half the variance", DCT, "(block * 0.25)", "(block * 0.5)", TRAIN),
    Mutation(
        "later frames coded backwards",
        DCT,
        "_to_latents, block, TEMPORAL, self._later, self._gain_later",
        "_to_latents, block.flip(2), TEMPORAL, self._later, self._gain_later",
        TRAIN,
    ),
    Mutation(
        "pooled text with what is common",
        BYTES,
        "layer_norm(self._pool(words) - self._common,",
        "layer_norm(self._pool(words),",
        TRAIN,
    ),
    Mutation("prompts cut by bytes", BYTES, "BYTE_LIMIT = 1024", "BYTE_LIMIT = 16", TRAIN),
    # What is read, and in which order.
    Mutation(
        "every frame of a fast clip",
        VIDEO,
        "                bucket.frames,\n                interval,",
        "                bucket.frames,\n                1,",
        TRAIN,
    ),
    Mutation("windows alike in every epoch", TRANSFORMS, 'seed, epoch, "window"', 'seed, 0, "window"', TRAIN),
    Mutation("window begins one frame early", TRANSFORMS, "num_frames - span + 1)", "num_frames - span)", TRAIN),
    Mutation(
        "frame rate of the file in the prompt",
        BUCKET,
        "return float(math.floor(fps / int(frame_interval(np.array([fps]))[0]))) if fps >= MAX_FPS else fps",
        "return fps",
        TRAIN,
    ),
    Mutation("motion score left out of prompts", PROMPT, "if motion is not None and", "if False and", TRAIN),
    Mutation(
        "samples in one order in all epochs",
        EPOCH,
        "self._source.seed, self.number, purpose)",
        "self._source.seed, 0, purpose)",
        TRAIN,
    ),
    Mutation("both orders of samples by one key", EPOCH, '"order of samples"', '"order of a kind"', TRAIN),
    Mutation(
        "micro-batches of unequal size",
        EPOCH,
        "cut * samples // cuts, (cut + 1) * samples // cuts",
        "cut * (samples // cuts), (cut + 1) * (samples // cuts)",
        TRAIN,
    ),
    Mutation("steps in the order of their cost", BALANCE, "steps[generator.permutation(len(steps))]", "steps", ORDER),
    Mutation("steps in random order by another key", PLAN, '"order of micro-batches"', '"order of steps"', TRAIN),
    Mutation(
        "a clip's caption for another",
        VIDEO,
        "caption = self._table.caption(sample_id)",
        "caption = self._table.caption(0)",
        TRAIN,
    ),
    # Checkpoints, resuming, exports.
    Mutation(
        "resumes with the first samples",
        DATA,
        "start_step=step,\n        stop_step",
        "start_step=0,\n        stop_step",
        RESUMED,
    ),
    Mutation(
        "resumes a step late", SETUP, 'step = int(manifest["step"]) if', 'step = int(manifest["step"]) + 1 if', RESUMED
    ),
    *(
        Mutation(
            f"resumes without the {what}",
            RESUME,
            "checkpoints.load(path, state)",
            f'checkpoints.load(path, {{k: v for k, v in state.items() if k != "{section}"}})',
            RESUMED,
        )
        for what, section in (("weights", "model"), ("moments", "optimizer"), ("average", "ema"))
    ),
    Mutation("exports the live weights", EXPORT, 'return "ema" if', 'return "live" if', TRAIN),
    Mutation("adapters without their scale", LORA, "layer.scale * layer.lora_B(", "layer.lora_B(", ADAPTERS),
    Mutation(
        *(
            "alpha of adapters lost",
            EXPORT,
            "trained_adapter(tensors, adapters.scale)",
            "trained_adapter(tensors, 1.0)",
        ),
        ADAPTERS,
    ),
    Mutation(
        "LoRA files: alpha/rank left out of B",
        ADAPTER_EXPORT,
        "exact = b.double() * scale",
        "exact = b.double()",
        f"{ADAPTER_FAMILIES}::test_drawn_adapters_are_written",
    ),
    Mutation(
        "LoRA files: an alpha that is not that of the rank",
        ADAPTER_EXPORT,
        "_number(scale * made.matrices(layer)[0].shape[0])",
        "_number(scale)",
        f"{ADAPTER_FAMILIES}::test_drawn_adapters_are_written",
    ),
    Mutation(
        "LoRA files: parts of a layer that is cut keep all of its rank",
        ADAPTER_EXPORT,
        "return (part != 0).any(0) | ~(whole != 0).any(0)",
        "return torch.ones(part.shape[1], dtype=torch.bool)",
        f"{ADAPTER_FORMATS}::test_a_part_without_an_adapter_of_its_own_has_none_when_a_layer_is_cut",
    ),
    Mutation(
        "LoRA files: adapters of a convolution as of a product",
        ADAPTER_EXPORT,
        "more = len(shape) - 2",
        "more = 0",
        f"{ADAPTER_FAMILIES}::test_the_embedding_of_patches_is_a_convolution_in_files",
    ),
    Mutation(
        "LoRA files: parts that were one layer have a rank each",
        FIT,
        "found[same] if same else slice(end, end + down.shape[0])",
        "slice(end, end + down.shape[0])",
        f"{ADAPTER_FORMATS}::test_parts_that_were_one_layer_share_its_rank_again",
    ),
    Mutation(
        "LoRA files: alpha that diffusers states of a model by itself",
        "opensora/models/weights/adapter_config.py",
        'if not own and "r" in values',
        'if not own and "rank" in values',
        "tests/unit/test_adapter_diffusers.py::test_we_read_what_diffusers_writes[wan-False]",
    ),
    Mutation(
        "adapters drawn wider",
        LORA,
        "bound = 1 / math.sqrt(tensor.shape[1])",
        "bound = 2 / math.sqrt(tensor.shape[1])",
        ADAPTERS,
    ),
    Mutation(
        "permuted rows as stored",
        ROWS,
        "[wanted % size]",
        "[wanted % size].sort()[0]",
        f"{FILES}::test_random_rows",
    ),
    Mutation(
        "reshaped rows from the first on",
        ROWS,
        "flat[low * size - start : high * size - start]",
        "flat[: (high - low) * size]",
        f"{FILES}::test_random_rows",
    ),
    Mutation(
        "parts of a joined tensor from its first rows",
        READER,
        "rows.part(low - position, high - position)",
        "rows.part(0, high - low)",
        f"{FILES}::test_random_rows",
    ),
    Mutation(
        "adapters placed in the order of their file",
        FIT,
        "places=rows.indices()",
        "places=torch.arange(rows.start, rows.stop)",
        f"{FILES}::test_our_adapters_for_other_tools_and_back",
    ),
    Mutation("fused projections in another order", LAYERS, "q, k, v = self.qkv(x)", "k, q, v = self.qkv(x)", FLUX),
    Mutation(
        "channels permuted the other way", CONVERT, 'to_half if to == "half" else', 'to_half if to != "half" else', FLUX
    ),
    # Other ways to the same numbers.
    Mutation("stored windows of one epoch", STORED, "(micro_batch.epoch % self.epochs)", "(0 % self.epochs)", FEATURES),
    Mutation(
        "packs with times of other samples",
        PACKING,
        "part.t for part in parts]",
        "part.t for part in parts[::-1]]",
        PACKS,
    ),
    Mutation(
        "packs joined without regard to cost",
        BALANCE,
        'by_sum = np.argsort(costs[packs].sum(axis=1), kind="stable")',
        "by_sum = np.arange(len(packs))",
        EVEN,
    ),
    Mutation(
        "substitutes alike in every epoch", VIDEO, 'epoch, "substitute", attempt', '0, "substitute", attempt', DAMAGED
    ),
    Mutation(
        "noise of the substitute",
        VIDEO,
        "            sample_ids=micro_batch.sample_ids,\n            bucket=micro_batch.bucket,",
        "            sample_ids=tuple(used),\n            bucket=micro_batch.bucket,",
        DAMAGED,
    ),
    Mutation(
        "caption of the unreadable sample",
        VIDEO,
        "for source, fps in zip(used, rates",
        "for source, fps in zip(micro_batch.sample_ids, rates",
        DAMAGED,
    ),
    # Sampling.
    Mutation(
        "guidance from the prompted pass",
        GUIDANCE,
        "guided = uncond + text_scale(",
        "guided = cond + text_scale(",
        CLIPS,
    ),
    Mutation("guidance oscillates on odd steps", GUIDANCE, "or step % 2 == 0", "or step % 2 == 1", CLIPS),
    Mutation(
        "schedule ends before the data",
        TIMES,
        "torch.linspace(1, 0, num_steps + 1",
        "torch.linspace(1, 0.001, num_steps + 1",
        CLIPS,
    ),
    Mutation(
        "schedule by all tokens",
        EULER,
        "grid.places, grid.latent_frames",
        "grid.tokens, grid.latent_frames",
        CLIPS,
    ),
    Mutation(
        "velocity at the next time", SOLVER, "solver.times[index], device", "solver.times[index + 1], device", CLIPS
    ),
    Mutation("negative prompt not read", PIPELINE, 'neg or [""] * len(text)', '[""] * len(text)', CLIPS),
    Mutation(
        "noise of the first seed for all",
        PIPELINE,
        "isinstance(seed, int) else seed\n",
        "isinstance(seed, int) else [seed[0]] * clips\n",
        CLIPS,
    ),
    Mutation(
        "noise keyed as in training",
        NOISE,
        'torch_generator(seed, "sampling noise")',
        'torch_generator(seed, "noise")',
        CLIPS,
    ),
    Mutation(
        "distilled guidance of one",
        GUIDANCE,
        "shape[0],), self.option.guidance,",
        "shape[0],), 1.0,",
        DISTILLED,
    ),
    Mutation("latents not scaled back", DCT, "(basis / gain[:, None])", "(basis * gain[:, None])", CLIPS),
    Mutation("levels rounded down", SAVE, "* 127.5).round()", "* 127.5).floor()", STILLS),
    Mutation("one seed for all samples of a prompt", PROMPTS, "cfg.sampling.seed + copy", "cfg.sampling.seed", STILLS),
    Mutation("samples from the live weights", LOAD, '"ema" if use_ema and', '"model" if use_ema and', WHOLE),
    Mutation(
        "adapters at full strength",
        LOAD,
        "merge_adapters(model, cfg.lora_scale)",
        "merge_adapters(model, 1.0)",
        WITH_ADAPTERS,
    ),
    Mutation("no words about motion in sampling", FIND, "bool(saved and saved.data.prompt_suffix)", "False", WHOLE),
    Mutation(
        "frame rate in the prompt of a still",
        "opensora/inference/prompts.py",
        "option.fps if option.num_frames > 1 else None",
        "option.fps",
        WHOLE,
    ),
    Mutation(
        "garbage collected within steps",
        GARBAGE,
        "gc.disable()",
        "gc.isenabled()",
        f"{BORDERS}::test_nothing_is_collected_between_borders",
    ),
    Mutation(
        "no collection after a run",
        GARBAGE,
        "gc.enable()",
        "gc.disable()",
        f"{BORDERS}::test_off_between_borders_and_as_it_was_afterwards",
    ),
    Mutation(
        "garbage of a step is kept",
        GARBAGE,
        "gc.collect()",
        "gc.get_count()",
        f"{BORDERS}::test_every_border_frees_the_cycles_of_its_step",
    ),
    Mutation(
        "two tests that wait with a limit at once",
        "tests/workers.py",
        'return 0, "in turn"',
        "return 0, file",
        "tests/unit/test_workers.py::test_no_two_workers_wait_at_once_and_every_test_is_run_once",
    ),
    Mutation(
        "a signal while a file is written leaves half of it",
        "opensora/utils/signal_handler.py",
        "if self._saving and not self._leaving:",
        "if self._saving and self._leaving:",
        "tests/faults/test_signals.py::test_a_command_without_a_state_leaves_after_the_file_that_it_writes[15--None-True]",
    ),
    # References: what is given in training, and in sampling.
    Mutation(
        "the tail of a reference taken from the head",
        REFERENCES,
        'self.end == "head" else x',
        "True else x",
        GIVEN_LOOP,
    ),
    Mutation(
        "references drawn anew for all samples alike",
        REFERENCES,
        '(seed, step, sample, "condition")',
        '(seed, step, 0, "condition")',
        REFERRED,
    ),
    Mutation(
        "kinds that do not fit are drawn",
        REFERENCES,
        "and fits(kind, latent_frames, shape)\n        and not",
        "and not",
        BY_WEIGHT,
    ),
    Mutation("weights of kinds left aside", REFERENCES, "kind: weights[kind]\n", "kind: 1.0\n", BY_WEIGHT),
    Mutation(
        "one latent frame too few for a longer reference",
        REFERENCES,
        "latent_frames + is_still(kind)",
        "latent_frames + 1",
        ROOM,
    ),
    Mutation(
        "a reference cut from the code of the whole clip",
        CODES,
        "part.of(batch.pixels[rows], part.frames)",
        "batch.pixels[rows][:, :, : part.frames]",
        REFERRED,
    ),
    Mutation("stored references of other samples", CODES, "[part.name][rows]", "[part.name][: len(rows)]", FEATURES),
    Mutation("known frames stay in the loss", STEP, "not self.conditioning.known_in_loss)", "False)", LEFT_OUT),
    Mutation(
        "known frames counted as learned",
        DATA,
        "return referenced if denoising.reads_beside",
        "return None if denoising.reads_beside",
        LEFT_OUT,
    ),
    Mutation("a clip that is all known is counted as learned", DATA, "shape, learn_some=True)", "shape)", LEFT_OUT),
    Mutation(
        "references drawn as their clips are",
        CODES,
        'f"posterior {part.name}"',
        '"posterior"',
        "tests/unit/test_references.py::test_references_are_drawn_apart_where_the_autoencoder_draws",
    ),
    Mutation(
        "the third pass knows the references",
        GUIDANCE,
        "without_text.without_reference(keeps_known=self.keeps_known)]",
        "without_text]",
        THREE_WAY,
    ),
    Mutation("image guidance fades over the clip alone", GUIDANCE, "(1 - step / last)", "1.0", REFERRED_CLIPS),
    Mutation(
        "image guidance grows past the last frame",
        GUIDANCE,
        "/ max(latent_frames - 1, 1)",
        "/ latent_frames",
        REFERRED_CLIPS,
    ),
    Mutation(
        "known frames of the first clip alone put back",
        GIVEN,
        "kept = known if",
        "kept = known * (torch.arange(len(known)) == 0)[:, None, None, None] if",
        EVERY,
    ),
    Mutation("known frames are not put back", PIPELINE, "latents = given.put_back(latents)", "pass", REFERRED_CLIPS),
    Mutation(
        "longer references put back",
        GIVEN,
        "known if keeps else",
        "known if True else",
        "tests/unit/test_golden_sampling.py::test_from_noise_to_pixels[v2v_head]",
    ),
    Mutation(
        "a still is told its reference",
        GIVEN,
        "torch.zeros_like(known) if still else known",
        "known",
        "tests/unit/test_golden_sampling.py::test_conditions_of_sampling[i2v_head.causal.T1]",
    ),
    Mutation(
        "the last frame of the first reference",
        GIVEN,
        "return -1 if part.end",
        "return 0 if part.end",
        "tests/unit/test_golden_sampling.py::test_conditions_of_sampling[i2v_tail.causal.T19]",
    ),
    Mutation(
        "repetitions of a known frame kept, where the family cuts them",
        LENGTHS,
        "return pixels[:, :, head : pixels.shape[2] - tail] if head",
        "return pixels if head",
        "tests/unit/test_golden_sampling.py::test_from_noise_to_pixels[uncausal_i2v_head]",
    ),
    Mutation(
        "repetitions of a known frame kept",
        LENGTHS,
        'head = min(more, repetitions(cond_type, shape, "head"))',
        "head = 0",
        "tests/unit/test_lengths.py::test_repetitions_of_a_known_frame_are_left_out",
    ),
    Mutation(
        "a clip that ends with a known frame loses it",
        LENGTHS,
        "head = more - tail",
        "pass",
        "tests/unit/test_lengths.py::test_repetitions_of_a_known_frame_are_left_out",
    ),
    Mutation(
        "no frames for the repetitions",
        LENGTHS,
        "(repetitions(cond_type, shape) > 0) * (stride - 1)",
        "0",
        "tests/unit/test_lengths.py::test_repetitions_of_a_known_frame_are_left_out",
    ),
    Mutation(
        "a lone tile decodes to a whole group",
        "opensora/models/base.py",
        "stride * tile if tile > 1 else 1",
        "stride * tile",
        "tests/unit/test_lengths.py::test_lone_tiles_are_counted_as_they_decode",
    ),
    Mutation(
        "the third pass of a script knows the references",
        DENOISERS,
        'given["cond"] = torch.zeros_like(known) if blind else known',
        'given["cond"] = known',
        "tests/unit/test_sampling_core.py::test_three_way_guidance",
    ),
    Mutation(
        "a script's model is told another scale",
        DENOISERS,
        "torch.full((clips,), float(guidance)",
        "torch.full((clips,), 2.0 * guidance",
        "tests/unit/test_golden_denoisers.py::test_every_step_is_the_published_one[i2v_plain]",
    ),
    Mutation(
        "two text encoders for a still and its clip",
        LOAD,
        "text if text and text.cfg == source.text else",
        "text if text is None and text else",
        "tests/reference/test_sampling.py::test_text_to_image_to_video",
    ),
    Mutation(
        "a script's prompts without words about motion",
        "opensora/inference/scripts/interface.py",
        "prompt_suffix=suffix, published",
        "prompt_suffix=False, published",
        "tests/integration/test_script.py::test_the_documented_script_makes_the_files_of_the_command[1]",
    ),
    Mutation(
        "channels of a token are taken for those of a latent",
        "opensora/inference/scripts/batch.py",
        "per_token = its_channels * its_patch**2",
        "per_token = its_channels",
        "tests/unit/test_script_interface.py::test_what_does_not_fit_costs_a_line[channels]",
    ),
    Mutation(
        "queries of reused attention are projected",
        "opensora/models/layers/attention.py",
        "if kept is not None and (output := kept()) is not None:",
        "if kept is not None and (output := None) is not None:",
        "tests/unit/test_step_caches.py::test_reused_attention_projects_nothing[True]",
    ),
    Mutation(
        "times of the first block not embedded with the prompt",
        MODEL,
        "+ self.vector_in(y_vec)",
        "",
        "tests/unit/test_script_interface.py::test_inputs_of_the_first_block[False]",
    ),
    Mutation(
        "guidance along the clip also of v2v",
        PIPELINE,
        "opt.scale_temporal_osci and is_still(cond_type)",
        "opt.scale_temporal_osci",
        "tests/unit/test_golden_sampling.py::test_temporal_scaling_is_of_single_frames_alone",
    ),
    Mutation(
        "frames rounded down",
        TIMES,
        "-(-(num_frames - lead) // frame_stride)",
        "(num_frames - lead) // frame_stride",
        "tests/unit/test_sampling_core.py::test_any_number_of_frames_is_rounded_up_to_what_can_be_coded",
    ),
    Mutation(
        "references cropped at the corner",
        GIVEN,
        "frames[:, top : top + size[0], left : left + size[1]]",
        "frames[:, : size[0], : size[1]]",
        REFERRED_CLIPS,
    ),
    Mutation(
        "16:9 by its own rounding",
        OPTIONS,
        "if transposed in RATIOS:",
        "if transposed in RATIOS and aspect_ratio not in RATIOS:",
        "tests/unit/test_sizes.py::test_sizes_of_a_ratio_that_is_listed_both_ways",
    ),
    Mutation(
        "the first of several clips is numbered",
        PROMPTS,
        '(self.copy == 0 and self.joint == "_")',
        "False",
        "tests/unit/test_prompts.py::test_every_prompt_gets_its_seeds_and_a_name_of_its_own",
    ),
    Mutation(
        "rows numbered from the first that is sampled",
        PROMPTS,
        "list(enumerate(rows))[cfg.start_index : cfg.end_index]",
        "list(enumerate(rows[cfg.start_index : cfg.end_index]))",
        "tests/unit/test_golden_sampling.py::test_file_names",
    ),
    Mutation(
        "stored references that a run lacks are overlooked",
        "opensora/assembly/stored_features.py",
        "<= set(map(str, stored)):",
        ">= set():",
        "tests/unit/test_references.py::test_stored_references_serve_runs_that_need_them_or_fewer",
    ),
    # Prompts that a language model writes out, and stills.
    Mutation(
        "the key is sent elsewhere",
        "opensora/utils/chat.py",
        "build_opener(_Stay)",
        "build_opener()",
        "tests/unit/test_refine.py::test_a_failure_leaves_the_prompt_and_says_so[HTTP status 302]",
    ),
    Mutation(
        "scores beyond what training has",
        "opensora/inference/refine.py",
        "min(max(int(found[1]), 1), MOST_MOTION)",
        "int(found[1])",
        "tests/unit/test_refine.py::test_scores_are_within_range[99 motion score-15]",
    ),
    Mutation(
        "stills guided as their clips",
        "opensora/inference/stills.py",
        "guidance=still.guidance",
        "guidance=cfg.sampling.guidance",
        "tests/reference/test_sampling.py::test_text_to_image_to_video",
    ),
    # Processes that meet: which address is whose, who is there twice, what chooses an interface.
    Mutation(
        "every address that can be bound is here",
        OWN_ADDRESSES,
        "return _same(source_address(address), address)",
        "return True",
        f"{ADDRESS_TEST}a_machine_that_may_bind_to_any_address",
    ),
    Mutation(
        "IPv4 by an IPv6 socket is IPv6",
        OWN_ADDRESSES,
        "return str(parsed.ipv4_mapped)",
        "return str(parsed)",
        f"{ADDRESS_TEST}ends_of_connections",
    ),
    Mutation(
        "temporary addresses are relied on",
        OWN_ADDRESSES,
        "if not int(own[4], 16) & _TEMPORARY:",
        "if True:",
        f"{ADDRESS_TEST}temporary_addresses_are_not_relied_on",
    ),
    Mutation(
        "loopback for other hosts",
        OWN_NETWORK,
        "outward = [one for one in outward if not is_loopback(one)]",
        "outward = [met for met in [me.address, *outward] if met]",
        f"{CHOICE_TEST}address_of_a_host",
    ),
    Mutation(
        "the key wins over the variable",
        OWN_NETWORK,
        "[*given, (KEY, configured.strip())][0]",
        "[*given, (KEY, configured.strip())][-1]",
        f"{CHOICE_TEST}who_chooses",
    ),
    Mutation(
        "gloo takes the first address",
        OWN_NETWORK,
        'listen_at(me.address if other else "")',
        'listen_at("")',
        f"{CHOICE_TEST}what_gloo_is_told",
    ),
    Mutation(
        "one host leaves loopback",
        OWN_NETWORK,
        "key=lambda one: not is_loopback(one[0])",
        "key=lambda one: is_loopback(one[0])",
        f"{CHOICE_TEST}within_a_host_it_is_loopback",
    ),
    Mutation("ranks may be there twice", RANK_0, "if twin is None:", "if True:", MEETINGS),
    Mutation("versions are not compared", RANK_0, "peer.problem or misfits([self.me, peer])", "peer.problem", MEETINGS),
    Mutation("another job is ours", FINDING, "if words[1:2] != [token]:", "if not words[1:2]:", MEETINGS),
    Mutation(
        "the first address only",
        FINDING,
        "for address in one.addresses for port",
        "for address in one.addresses[:1] for port",
        MEETINGS,
    ),
    Mutation(
        "names are asked once",
        FINDING,
        "while not self._over.is_set():\n            try:",
        "while not self.tried.is_set():\n            try:",
        MEETINGS,
    ),
    Mutation(
        "one step of SLURM per host",
        STARTING,
        'if launcher != "slurm":',
        "if False:",
        f"{CHOICE_TEST}tokens_are_the_same_on_all_hosts_of_a_start",
    ),
    # Models that keep time and space apart.
    Mutation(
        "frames come back in the reverse order",
        SWITCH,
        "for block, part in zip(blocks, parts, strict=True)]",
        "for block, part in zip(blocks, parts, strict=True)][::-1]",
        SWITCHED,
    ),
    Mutation("few frames exchanged", LAYOUT, "(frames >= degree or", "(frames >= 1 or", FRAMES),
    Mutation(
        "as many frames as processes not exchanged", LAYOUT, "(frames >= degree or", "(frames > degree or", FRAMES
    ),
    Mutation("heads of one tensor process taken for all", LAYOUT, "heads // self._tensor, self", "heads, self", FRAMES),
    Mutation("masks sent as numbers", RANK, ".get(dtype, dtype.itemsize)", ".get(dtype, compute)", COUNTED),
    Mutation("switches run again to the end", VOLUME, "(again.around and switch.reruns)", "again.around", COUNTED),
    # Ranks on hosts, and the bytes that leave one.
    Mutation(
        "hosts as the launcher names them",
        PLACEMENT,
        "min(consecutive, packed,",
        "min(consecutive, consecutive,",
        FEWEST,
    ),
    Mutation("smallest pieces first", PLACEMENT, "sorted((1, *inner), reverse=True)", "sorted((1, *inner))", FEWEST),
    Mutation("no pair that fills a block", PLACEMENT, "todo[host] + todo[b] == size", "False", FEWEST),
    Mutation("parts counted from the first process", HOST_TRAFFIC, "rank // stride % degree", "rank // stride", SPLIT),
    Mutation("gloo reduces as it scatters", HOST_TRAFFIC, '"gloo": 2', '"gloo": 1', BY_HAND),
    # One folder for all machines.
    Mutation("any owner is the main process", SAME_FILES, 'owner["token"] == token', 'owner["token"] != ""', ELSEWHERE),
    Mutation("caches are not waited for", SAME_FILES, "CACHED_S = 40.0", "CACHED_S = 1.0", BLIND),
    Mutation("one who sees the folder is enough", SAME_FILES, "for rank in blind):", "for rank in blind[1:]):", BLIND),
    Mutation(
        "weights are not compared",
        SAME_FILES,
        '{f"the content of {key}={path}": fingerprint(path)',
        '{f"the content of {key}={path}": key',
        COMPARED,
    ),
    Mutation("all heads leave the host", VOLUME, "sum(compress(by_process, counted))", "sum(by_process)", SPLIT),
    Mutation(
        "both processes have a link of their own",
        NETWORK,
        "count * crosses / self.between)",
        "count * bool(crosses) / self.between)",
        LINKS + "test_time_is_of_the_slower_link",
    ),
    Mutation(
        "text of cross-attention cut",
        PROFILE,
        'return not self._of_sequence.isdisjoint({"txt", "txt_here"})',
        'return True or not self._of_sequence.isdisjoint({"txt", "txt_here"})',
        STATED,
    ),
    Mutation(
        "as many keys as queries",
        PROFILING,
        "(q.shape[0], q.shape[1], k.shape[1])",
        "(q.shape[0], q.shape[1], q.shape[1])",
        OPERATIONS,
    ),
    Mutation(
        "sides of a clip fit square patches only",
        "opensora/models/base.py",
        "lcm(stride[1] * self.patch[1], stride[2] * self.patch[2])",
        "stride[1] * self.patch[1]",
        "tests/unit/test_patches.py::test_sizes_are_whole_tokens",
    ),
    Mutation(
        "text tokens counted that no model reads",
        DATA,
        "describe(cfg.model).text_tokens(text_tokens(cfg.text))",
        "text_tokens(cfg.text)",
        "tests/unit/test_no_text.py::test_text_tokens_count_where_the_model_reads_them",
    ),
    # Launchers of several machines: what the coordinator decides.
    Mutation(
        "a machine of several ranks counted as one",
        COORDINATOR,
        "first += machine.about.processes",
        "first += 1",
        f"{ORDERS}::test_the_ranks_of_uneven_machines",
    ),
    Mutation(
        "a host without power never missed",
        COORDINATOR,
        "machine.lost is None and silent > self._limits.heartbeat_s",
        "machine.lost is None and silent < 0",
        f"{ORDERS}::test_a_host_that_dies_is_named_in_time[power]",
    ),
    Mutation(
        "a connection that ended never missed",
        COORDINATOR,
        "now - machine.lost > min(RETURN_S, self._limits.heartbeat_s)",
        "now < machine.lost",
        f"{ORDERS}::test_a_host_that_dies_is_named_in_time[killed]",
    ),
    Mutation(
        "a newcomer counted as a failure",
        COORDINATOR,
        'start again with it", gentle=True, now=now)',
        'start again with it", gentle=False, now=now)',
        f"{ORDERS}::test_a_host_that_dies_and_comes_back_elastic",
    ),
    Mutation(
        "the first report taken for the cause",
        COORDINATOR,
        "cause = min(self._failed, key=lambda one: one.weight)",
        "cause = self._failed[0]",
        f"{ORDERS}::test_codes_that_are_final[2]",
    ),
    Mutation(
        "the run over when one machine has finished",
        COORDINATOR,
        "if self._finished.issuperset(self._roster):",
        "if self._finished:",
        f"{ORDERS}::test_a_machine_that_has_finished_may_go",
    ),
    Mutation(
        "what was used of the restarts forgotten",
        COORDINATOR,
        "return about.failures + (about.round > 0 and about.epoch != epoch)",
        "return 0",
        f"{ORDERS}::test_a_coordinator_started_anew_counts_what_was_used",
    ),
    # Step caches: when a step reuses, and who has to know of it.
    Mutation(
        "passes of guidance share what is kept", CACHED_BLOCKS, "setdefault(self._at.number,", "setdefault(0,", REUSED
    ),
    Mutation(
        "a clip finds what the one before left",
        CACHED_BLOCKS,
        "            self._passes.clear()",
        "            pass",
        ANEW,
    ),
    Mutation(
        "a change measured from the step before",
        CACHED_BLOCKS,
        'kept.decisions.since == "before" or not reuses',
        "True",
        REUSED,
    ),
    Mutation(
        "what is kept includes the first blocks",
        CACHED_BLOCKS,
        "tuple(x - y for x, y in zip(streams, carried, strict=True))",
        "streams",
        REUSED,
    ),
    Mutation(
        "bad numbers are no change",
        DECISIONS,
        "change <= self.cfg.threshold",
        "not change > self.cfg.threshold",
        BAD_NUMBERS,
    ),
    Mutation("the last step reuses", DECISIONS, "at.step in (0, at.steps - 1)", "at.step == 0", TEACACHE),
    Mutation(
        "the polynomial read from its end",
        DECISIONS,
        "in self.cfg.polynomial:",
        "in self.cfg.polynomial[::-1]:",
        TEACACHE,
    ),
    Mutation("errors of reuses not added up", DECISIONS, "self._error += abs(", "self._error = abs(", MAGCACHE),
    Mutation("a threshold reached still reuses", DECISIONS, "if self._sum < self.cfg.threshold:", "if True:", TEACACHE),
    Mutation(
        "attention computed one step late",
        CACHED_ATTENTION,
        "call % self.every[axis] == 0",
        "call % self.every[axis] == 1",
        PYRAMID,
    ),
    Mutation(
        "times on the edge reuse",
        CACHED_ATTENTION,
        "low < 1000 * at.time < high",
        "low <= 1000 * at.time <= high",
        PYRAMID,
    ),
    Mutation(
        "passes share attention",
        CACHED_ATTENTION,
        "calls, output = self._kept[at.number]",
        "calls, output = self._kept[0]",
        PYRAMID,
    ),
    Mutation(
        "all decide on the tokens of one",
        CACHES_ON_MESH,
        "values = gathered.view(axis.degree, -1).sum(dim=0)",
        "values = gathered.view(axis.degree, -1)[0]",
        f"{CACHES_DIST}[2-ulysses2-zero3-prefetch0]",
    ),
    Mutation(
        "weights gathered though all reuse",
        CACHES_ON_MESH,
        "return bool(collectives.all_reduce_(votes, self.mesh[FSDP]).item())",
        "return collectives.all_reduce_(votes, self.mesh[FSDP]).item() >= 0",
        "tests/dist/test_step_caches.py::test_weights_are_gathered_where_somebody_computes",
    ),
    Mutation(
        "references of a contact sheet drawn over one another",
        "opensora/utils/charts.py",
        "left += image.width + MARGIN",
        "left += image.width",
        "tests/unit/test_logging.py::test_references_stand_framed_beside_their_clips",
    ),
    Mutation(
        "a contact sheet without what clips were made from",
        "opensora/inference/save.py",
        "self._write_sheet(rows, given if any(given) else ())",
        "self._write_sheet(rows, ())",
        "tests/dist/test_saving_samples.py::test_the_sheet_shows_what_clips_were_made_from",
    ),
    Mutation(
        "a model that is told nothing of its references",
        "opensora/inference/pipeline.py",
        "reference=given.told().to(x) if given else None,",
        "reference=given.told().to(x) * 0 if given else None,",
        "tests/unit/test_shipped_model.py::test_clips_go_on_from_their_first_frames",
    ),
    Mutation(
        "prompts encoded together",
        "opensora/models/text/row_by_row.py",
        "if rows == 1:",
        "if rows >= 1:",
        f"{TEXT_FILES}::test_blocks_see_one_prompt_at_a_time",
    ),
    Mutation(
        "positions of CLIP all the same",
        "opensora/models/text/weights.py",
        "torch.arange(buffer.shape[-1], device=device)",
        "torch.zeros(buffer.shape[-1], dtype=torch.long, device=device)",
        f"{TEXT_FILES}::test_files_with_other_names[the whole model]",
    ),
    Mutation(
        "features kept without a bound",
        "opensora/models/text/prompt_cache.py",
        "while self._held > self._most:",
        "while self._held > 4 * self._most:",
        f"{TEXT_FILES}::test_what_is_kept_is_bounded",
    ),
    Mutation(
        "equal prompts encoded again",
        "opensora/models/text/transformers_encoder.py",
        "missing = [prompt for prompt, row in rows.items() if row is None]",
        "missing = [prompt for prompt in prompts if rows[prompt] is None]",
        f"{TEXT_FILES}::test_every_prompt_as_alone_and_equal_ones_once",
    ),
    Mutation(
        "values of a sharded text encoder not looked at",
        "opensora/assembly/sharded_text.py",
        "        source.check_values()\n",
        "",
        "tests/dist/test_sharded_text.py::test_a_value_that_one_process_reads",
    ),
    Mutation(
        "text encoder kept whole once it was gathered",
        "opensora/assembly/sharded_text.py",
        "fsdp.shard(file.module, 3, precision",
        "fsdp.shard(file.module, 0, precision",
        "tests/dist/test_sharded_text.py::test_no_process_holds_the_whole",
    ),
    Mutation(
        "length taken instead of skipped by the published rule",
        "opensora/datasets/buckets/published_rule.py",
        "draw() < skip",
        "draw() >= skip",
        f"{RULE}::test_other_tables[1]",
    ),
    Mutation(
        "ratio of the size in place of its name's",
        "opensora/datasets/buckets/published_rule.py",
        "found.append((height / width, size))",
        "found.append((size[0] / size[1], size))",
        f"{RULE}::test_other_tables[1]",
    ),
    Mutation(
        "1.x: clips of just the window are taken",
        "opensora/datasets/buckets/rule_1x.py",
        "return frames > row.frames * self._interval",
        "return frames >= row.frames * self._interval",
        f"{RULE_1X}::test_other_tables_and_clips[0]",
    ),
    Mutation(
        "1.x: rows numbered within their resolution",
        "opensora/datasets/buckets/rule_1x.py",
        "_Row(number, row.frames, row.keep, accept)",
        "_Row(len(self._rows.get(row.resolution, [])), row.frames, row.keep, accept)",
        f"{RULE_1X}::test_every_decision_is_equal[1.1]",
    ),
    Mutation(
        "1.x: buckets counted without equal sizes",
        "opensora/datasets/buckets/rule_1x.py",
        "self._count = sum(len(self._sizes[row.resolution]) for row in buckets.rows)",
        "self._count = len(buckets.rows)",
        f"{RULE_1X}::test_every_decision_is_equal[1.2]",
    ),
    Mutation(
        "1.x: a row skipped by the wrong side",
        "opensora/datasets/buckets/rule_1x.py",
        "generator.random() > row.accept",
        "generator.random() < row.accept",
        f"{RULE_1X}::test_every_decision_is_equal[1.3]",
    ),
    Mutation(
        "1.x: ratios nearest by their logarithm",
        "opensora/datasets/buckets/sizes_1x.py",
        "key=lambda name: abs(float(name) - height / width)",
        "key=lambda name: max(float(name) * width / height, height / width / float(name))",
        f"{RULE_1X}::test_ratios_are_compared_by_their_difference",
    ),
    Mutation(
        "1.x: features of another window",
        "opensora/assembly/stored_features.py",
        "{} if data.frame_interval is None else",
        "{} if data.frame_interval else",
        f"{RULE_1X}::test_stored_features_belong_to_a_rule_and_a_window",
    ),
    Mutation(
        "1.x: two ratios of 4k in ascending order",
        "opensora/datasets/buckets/sizes_1x.py",
        "names[i], names[j] = names[j], names[i]",
        "names[i], names[j] = names[i], names[j]",
        f"{RULE_1X}::test_tables_of_sizes_are_equal[1.2]",
    ),
    Mutation(
        "1.x: names of ratios without their zeros in 1.3",
        "opensora/datasets/buckets/sizes_1x.py",
        'name if version == "1.3" else',
        'name if version == "1.2" else',
        f"{RULE_1X}::test_tables_of_sizes_are_equal[1.3]",
    ),
    Mutation(
        "1.x: a reserved row is an error",
        "opensora/datasets/buckets/bucket.py",
        "row.keep == 0 and self._cfg.bucket_rule in RULES_1X",
        "row.keep == 0 and self._cfg.bucket_rule not in RULES_1X",
        f"{RULE_1X}::test_no_sample_is_lost_on_any_number_of_processes[1.1]",
    ),
    Mutation(
        "1.x: a fixed stride in the window",
        "opensora/datasets/decode/common.py",
        "np.linspace(start, start + span - 1, count).astype(np.int64).tolist()",
        "[start + i * (span // count) for i in range(count)]",
        f"{CLIPS_1X}::test_neighbours_are_not_all_equally_far_apart",
    ),
    Mutation(
        "1.x: numbers rounded to the nearest frame",
        "opensora/datasets/decode/common.py",
        "np.linspace(start, start + span - 1, count).astype(np.int64)",
        "np.rint(np.linspace(start, start + span - 1, count)).astype(np.int64)",
        f"{CLIPS_1X}::test_neighbours_are_not_all_equally_far_apart",
    ),
    Mutation(
        "1.x: the last window of a clip is never drawn",
        "opensora/datasets/loading/window.py",
        "max(1, num_frames - span + 1), seed",
        "max(1, num_frames - span), seed",
        f"{CLIPS_1X}::test_windows_lie_in_their_clips[1]",
    ),
    Mutation(
        "1.x: corners of pictures aligned",
        "opensora/datasets/decode/common.py",
        "(np.arange(wanted) + 0.5) * (size / wanted) - 0.5",
        "np.arange(wanted) * (size / wanted)",
        f"{CLIPS_1X}::test_bilinear_is_that_of_torch[1]",
    ),
    Mutation(
        "1.x: stills scaled as clips are",
        "opensora/datasets/decode/common.py",
        "return replace(resize, bilinear=False) if isinstance(resize, ResizeToFill) else resize",
        "return resize",
        f"{CLIPS_1X}::test_packs_hold_the_same",
    ),
    Mutation(
        "1.x: the rate of the clip is told",
        "opensora/datasets/loading/window.py",
        "float(fps // cfg.interval)",
        "float(fps // 1)",
        f"{CLIPS_1X}::test_rates_are_divided_and_rounded_down[30.0-3-10.0]",
    ),
    Mutation(
        "masks: two frames, both given",
        "opensora/conditioning/frames.py",
        "known[-1] = False",
        "known[-1] = True",
        f"{MASKS_1X}::test_distributions_of_masks_are_equal[1_3]",
    ),
    Mutation(
        "masks: a quarter with one frame more",
        "opensora/conditioning/frames.py",
        "rng.integers(1, max(1, longest(frames)) + 1)",
        "rng.integers(1, max(1, longest(frames)) + 2)",
        f"{MASKS_1X}::test_distributions_of_masks_are_equal[1_1]",
    ),
    Mutation(
        "mask_types: halves rounded up",
        "opensora/conditioning/mask_types.py",
        '"v2v_head": lambda frames, rng: list(range(frames // 2))',
        '"v2v_head": lambda frames, rng: list(range((frames + 1) // 2))',
        f"{MASKS_1X}::test_frames_of_every_type_are_equal",
    ),
    Mutation(
        "mask_types: prompts dropped all the same",
        "opensora/train/preparation.py",
        "return drop_txt & ~has, drop_vec & ~has, none",
        "return drop_txt, drop_vec, none",
        f"{GIVEN_1X}::test_what_the_model_reads[0-conditions0]",
    ),
    Mutation(
        "mask_types: noise in no reference",
        "opensora/train/preparation.py",
        "if one.noise]",
        "if one.noise > 1]",
        f"{GIVEN_1X}::test_what_the_model_reads[0-conditions0]",
    ),
    Mutation(
        "mask_types: nothing given is nothing told",
        "opensora/train/preparation.py",
        "        if cfg.mask_types:\n",
        '        if any(cfg.mask_types.get(name) for name in cfg.mask_types if name != "none"):\n',
        f"{GIVEN_1X}::test_nothing_given_still_adds_the_biases",
    ),
    Mutation(
        "warm-up that reaches its rate a step early",
        "acceleration/optim/optimizers.py",
        "(step + 1) / (cfg.warmup_steps + 1)",
        "(step + 1) / cfg.warmup_steps",
        "tests/unit/test_acceleration.py::test_warm_up_from_a_rate",
    ),
    Mutation(
        "a file that is longer than what was published",
        "opensora/cli/download.py",
        "known.size is not None and size != known.size",
        "known.size is not None and size > known.size",
        "tests/unit/test_download.py::test_files_that_are_not_those_that_were_published",
    ),
    Mutation(
        "newest commit at every download",
        "opensora/cli/download.py",
        "repository.revision or kept.get(repository.name)",
        "repository.revision",
        "tests/unit/test_download.py::test_the_files_come_and_the_commit_of_the_first_download_stays",
    ),
    Mutation(
        "a file that was stopped begins again",
        "opensora/utils/files/hub.py",
        'part.open("ab")',
        'part.open("wb")',
        "tests/unit/test_download.py::test_a_file_that_was_stopped_goes_on_where_it_was",
    ),
    Mutation(
        "stored features looked at after the table is indexed",
        "opensora/train/setup.py",
        "        feature_store.read_manifest(Path(cfg.data.features))\n",
        "        pass\n",
        "tests/faults/test_refused_early.py::test_what_a_look_tells_is_said_before_a_table_is_indexed",
    ),
    Mutation(
        "empty cells of a parquet table are words",
        "opensora/utils/files/parquet_rows.py",
        'values[column] or ""',
        "str(values[column])",
        "tests/unit/test_prompts.py::test_a_parquet_table_is_read_as_its_csv",
    ),
    Mutation(
        "digests of a pinned commit asked of others",
        "opensora/cli/download.py",
        "repository.revision in (None, commit)",
        "repository.revision",
        "tests/unit/test_download.py::test_what_is_known_here_goes_before_what_a_hub_lists",
    ),
    Mutation(
        "nothing wrong with a file that is not there",
        "opensora/cli/doctor.py",
        "    return 2\n\n\nif __name__",
        "    return 0\n\n\nif __name__",
        "tests/unit/test_doctor.py::test_what_is_published_is_not_there[sample]",
    ),
    Mutation(
        "text encoder forecast as if it were whole",
        "opensora/planner/encoder_memory.py",
        'return -(-whole // pieces) if getattr(cfg, "shard", False) else whole',
        "return whole",
        "tests/unit/test_doctor.py::test_memory_by_where_the_text_encoder_is",
    ),
    # Autoencoders: networks, tiles, draws, files, memory.
    Mutation(
        "attention that sees later frames",
        HUNYUAN,
        "k[:, :, :end], v[:, :, :end]",
        "k, v",
        NETS + "attention_is_that_of_the_dense_mask[size1-64]",
    ),
    Mutation(
        "edges of the first frame repeated too rarely",
        HUNYUAN,
        "before, 0), mode=",
        "before - 1, 1), mode=",
        NETS + "convolutions_in_parts_are_the_same[7-stride1-300]",
    ),
    Mutation(
        "channels averaged that lie apart",
        DC_AE_NETWORK,
        '"b (c n) t h w -> b c t h w", "mean", c=width',
        '"b (n c) t h w -> b c t h w", "mean", c=width',
        NETS + "dc_ae_of_a_still_is_that_of_diffusers",
    ),
    Mutation(
        "norm without its bias",
        DC_AE_NETWORK,
        " + self.bias[:, None, None, None]",
        "",
        NETS + "dc_ae_of_a_still_is_that_of_diffusers",
    ),
    Mutation(
        "latents multiplied by the scale of DC-AE",
        DC_AE,
        "latents.float() / self.cfg.scale",
        "latents.float() * self.cfg.scale",
        NETS + "scale_of_dc_ae",
    ),
    Mutation(
        "posterior drawn with its variance",
        POSTERIOR,
        "torch.exp(0.5 * self.logvar)",
        "torch.exp(self.logvar)",
        NETS + "draws_are_functions_of_their_keys[hunyuan]",
    ),
    Mutation(
        "posterior of epoch 0 always",
        ENCODERS,
        "self.seed, epoch, sample_ids, drawn_for",
        "self.seed, 0, sample_ids, drawn_for",
        NETS + "draws_are_functions_of_their_keys[flux2d]",
    ),
    Mutation(
        "one noise for all bins",
        HELD_OUT_LOSS,
        "prepare(batch, index))",
        "prepare(batch, 0))",
        "tests/integration/test_validation.py::test_the_numbers_are_those_of_the_formulas",
    ),
    Mutation(
        "held-out clips of idle processes counted",
        "opensora/datasets/plan/held_out.py",
        "(self.micro_batches[-1].uncounted(),)",
        "(self.micro_batches[-1],)",
        VALIDATION + "every_sample_is_counted_once[4]",
    ),
    Mutation(
        "clips that cannot be read counted",
        HELD_OUT_LOSS,
        "torch.where(counted, x.double(), 0.0).sum()",
        "x.double().sum()",
        VALIDATION + "means_are_over_latent_values",
    ),
    Mutation(
        "average lost after validation",
        NATIVE,
        "            average.copy_(kept)\n",
        "",
        VALIDATION + "the_average_takes_the_place_of_the_weights_and_goes_back[none]",
    ),
    Mutation(
        "prompts dropped in validation",
        HELD_OUT_LOSS,
        "dropout=DropoutConfig(text=0.0, pooled=0.0)",
        "dropout=DropoutConfig()",
        VALIDATION + "bins_share_out_the_time_and_draw_for_themselves",
    ),
    Mutation(
        "perceptual distance of a frame once, not for every value",
        AE_LOSSES,
        "perceptual = distances.mean() * values",
        "perceptual = distances.mean()",
        LOSSES + "reconstruction_by_hand[0.0]",
    ),
    Mutation(
        "features compared at their lengths",
        "opensora/models/vae/training/lpips.py",
        "yield x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPSILON)",
        "yield x",
        LOSSES + "lpips_by_hand",
    ),
    Mutation(
        "adaptive weight upside down",
        AE_LOSSES,
        "for loss in (nll, g))",
        "for loss in (g, nll))",
        LOSSES + "adaptive_weight_balances_gradients_and_is_bounded",
    ),
    Mutation(
        "divergence of frames added up", POSTERIOR, "if self.per_frame:", "if False:", NETS + "divergence_of_a_normal"
    ),
    Mutation(
        "tiles fade in from the start of the one before",
        VAE_TILES,
        "before.shape[dim] - extent, extent)",
        "0, extent)",
        "tests/unit/test_vae.py::test_hunyuan_tiles_are_those_of_diffusers[time]",
    ),
    Mutation(
        "stages of the decoder counted from the wrong end",
        FLUX_NAMES,
        "levels - 1 - int(found[1])",
        "int(found[1])",
        AE_FILES + "names_of_flux_are_those_of_diffusers",
    ),
    Mutation(
        "features belong to options that they did not know",
        VAE_TABLE,
        "field.name not in later or",
        "True or",
        AE_FILES + "features_made_before_the_options_came_still_fit",
    ),
    Mutation(
        "earlier tiling without cuts in time",
        HUNYUAN_AE,
        "temporal_tiling=True, tile_frames=frames",
        "temporal_tiling=False, tile_frames=frames",
        AE_FILES + "earlier_configurations_mean_what_they_meant",
    ),
    Mutation(
        "memory of no tile",
        CODING,
        "if last[piece.shape] == index",
        "if index < 0",
        NETS + "memory_is_as_forecast[hunyuan-dtype0]",
    ),
    # Offload in sampling.
    Mutation(
        "a turn leaves its weights on the device",
        TURNS,
        "            module.send_out()\n        self._reset",
        "            pass\n        self._reset",
        OFFLOADED,
    ),
    Mutation(
        "blocks stay behind their use",
        STREAMED,
        "            self._leave(index)\n\n        offloaded",
        "            pass\n\n        offloaded",
        OFFLOADED,
    ),
    Mutation(
        "all blocks ahead",
        STREAMED,
        "            self._fetch(index + 1)",
        "            [self._fetch(i) for i in range(index, len(self._blocks))]",
        OFFLOADED,
    ),
    # Norms over the channels of all heads under tensor parallelism.
    Mutation(
        "a norm over the channels of this process's heads alone",
        TENSOR_CUT,
        "squares = collectives.all_reduce_(exact.square().sum(dim=-1, keepdim=True), axis)",
        "squares = axis.degree * exact.square().sum(dim=-1, keepdim=True)",
        NORMS_CUT.format("layouts_equal_one_process[2]"),
    ),
    Mutation(
        "the gradient of a norm through this process's heads alone",
        TENSOR_CUT,
        "shared = collectives.all_reduce_((normed * scaled).sum(dim=-1, keepdim=True), ctx.axis)",
        "shared = (normed * scaled).sum(dim=-1, keepdim=True)",
        NORMS_CUT.format("layouts_equal_one_process[2]"),
    ),
    Mutation(
        "a cut norm in the type of its input",
        TENSOR_CUT,
        "    return torch.float64 if x.dtype == torch.float64 else torch.float32",
        "    return x.dtype",
        NORMS_CUT.format("bytes_on_the_meta_device"),
    ),
    Mutation(
        "every layer of queries, keys and values sums the gradient of what it reads",
        SHARED_INPUTS,
        "return self._shared.of(x, lambda: collectives.share_out(x, self._axis))",
        "return collectives.share_out(x, self._axis)",
        SHARED_BY_HAND.format("a_block_of_wan[2-none]"),
    ),
    Mutation(
        "a tensor that was written to is taken for what was read",
        SHARED_INPUTS,
        "if version != x._version:",
        "if version is None:",
        SHARED_BY_HAND.format("different_tensors_are_summed_by_themselves"),
    ),
    Mutation(
        "what cut layers have read is kept",
        "acceleration/distributed/collectives.py",
        "return x.detach()  # no view of x, which would keep it",
        "return x.view_as(x)",
        SHARED_BY_HAND.format("what_was_read_is_not_kept"),
    ),
    Mutation(
        "all blocks share the gradient of the text",
        TENSOR_CUT,
        "inputs[block.get(id(module))]",
        "inputs[None]",
        SHARED_BY_HAND.format("a_block_of_wan[2-none]"),
    ),
    Mutation(
        "a formula in which every cut layer sums the gradient of its input",
        "acceleration/accounting/model_profile.py",
        " and not self.reads_again",
        "",
        SHARED_BY_HAND.format("a_block_of_wan[4-full]"),
    ),
    Mutation(
        "a forecast in which nobody waits for a process with one more head",
        "opensora/planner/forecast.py",
        "return -(-slot.heads // (shares.tensor * cut)) * cut * shares.tensor",
        "return slot.heads",
        LAYOUT_SEARCH.format("the_process_with_most_heads_decides[none-degrees0-2]"),
    ),
    Mutation(
        "layouts whose ulysses divides the heads alone",
        "opensora/planner/search.py",
        "ulysses > heads // tensor",
        "heads // tensor % ulysses",
        LAYOUT_SEARCH.format("heads_that_are_not_divided_are_proposed_and_none_without_a_head"),
    ),
    Mutation(
        "memory of uneven heads as of even ones",
        "opensora/planner/forecast.py",
        "if any(_heads_waited_for(slot, shares) > slot.heads for slot in slots) else 2",
        "if not any(slots) else 2",
        VIDEO_PLANS.format("interpolation_is_close_to_running_the_shape[wan with a picture]"),
    ),
    Mutation(
        "memory of a sample as if all of ulysses cut it",
        "opensora/planner/forecast.py",
        "mesh, shares = place.mesh.submesh(batch.degree), TokenShares",
        "mesh, shares = place.mesh, TokenShares",
        "tests/unit/test_forecast.py::test_interpolation_is_close_to_running_the_shape",
    ),
    Mutation(
        "apex's norm in place of a cut one",
        "acceleration/blocks/fused_norms.py",
        'if "forward" in vars(module):',
        'if "backward" in vars(module):',
        NORMS_CUT.format("in_the_types_that_models_compute_in[torch.float32-apex]"),
    ),
    Mutation(
        "exchanges of norms not counted where a block runs again",
        "acceleration/accounting/comm_volume.py",
        "_norm_bytes(norm, shares) * (1 + (again.layers and norm.reruns) + norm.input_trains)",
        "_norm_bytes(norm, shares) * (1 + norm.input_trains)",
        NORMS_CUT.format("layouts_equal_one_process[2]"),
    ),
    # Sizes of Wan and HunyuanVideo in the planner.
    Mutation(
        "text that a model cuts itself counted as whole behind the cut",
        "acceleration/accounting/rank_layout.py",
        "parts = zip(given, cut, img,",
        "parts = zip(given, given, img,",
        VIDEO_PLANS.format(
            "layouts_of_any_size_count_on_the_meta_device_what_is_predicted[hunyuan_video-degrees2-full]"
        ),
    ),
    Mutation(
        "all text counted as what a process goes on with",
        "acceleration/accounting/rank_layout.py",
        "given = cut if profile.cuts_text and not profile.cuts_text_itself else",
        "given = cut if profile.cuts_text else",
        VIDEO_PLANS.format(
            "layouts_of_any_size_count_on_the_meta_device_what_is_predicted[hunyuan_video-degrees2-full]"
        ),
    ),
    Mutation(
        "attention in no slot costs nothing",
        "acceleration/accounting/profiling.py",
        "        if func is scaled_dot_product_attention:",
        "        if func is None:",
        "tests/unit/test_published_costs.py::test_hunyuan_video_as_published",
    ),
    Mutation(
        "a picture's tokens taken for those of the text",
        "opensora/planner/meta_model.py",
        "image_tokens=zeros(batch.picture, denoising.image_dim)",
        "image_tokens=zeros(batch.txt, denoising.image_dim)",
        "tests/unit/test_published_costs.py::test_a_picture_costs_what_its_keys_and_values_do",
    ),
    Mutation(
        "text of whole samples interpolated as a part",
        "opensora/planner/forecast.py",
        "if self.structure.cuts_text and not self.structure.cuts_text_itself:",
        "if self.structure.cuts_text:",
        VIDEO_PLANS.format("interpolation_is_close_to_running_the_shape[hunyuan_video]"),
    ),
    # Offload in training of adapters, and its forecast.
    Mutation(
        "blocks stay behind their backward",
        STREAMED,
        "on_backward_end(args, lambda: self._leave(index))",
        "on_backward_end(args, lambda: None)",
        "tests/device/test_lora_offload.py::test_the_same_numbers_and_no_more_bytes_than_forecast",
    ),
    Mutation(
        "blocks run before their copies are there",
        STREAMED,
        "        self._fetch(index)\n        self._settle(index)",
        "        self._fetch(index)",
        STREAM_ORDER.format("training"),
    ),
    Mutation(
        "memory given up while copies write to it",
        STREAMED,
        "        self._settle(index)  # copies that nobody has waited for still write to its memory",
        "        self._done.pop(index, None)",
        STREAM_ORDER.format("a_block_that_is_passed_by_is_waited_for"),
    ),
    Mutation(
        "copies into memory that is not free yet",
        STREAMED,
        "            self._copies.wait_stream(torch.cuda.current_stream())",
        "            ",
        STREAM_ORDER.format("sampling"),
    ),
    Mutation(
        "blocks taken to be alike whatever is trained in them",
        "opensora/planner/meta_model.py",
        "all(one == made_of[0] for one in made_of)",
        "made_of",
        "tests/unit/test_accounting.py::test_a_few_blocks_tell_of_all[adapters in some]",
    ),
    Mutation(
        "adapters forecast as if no process cut them",
        "acceleration/accounting/profiling.py",
        "return (dim if is_cut else None), not is_cut",
        "return None, not is_cut",
        "tests/unit/test_accounting.py::test_what_tensor_parallelism_cuts[adapters]",
    ),
    Mutation(
        "gradients of adapters summed over nobody",
        "acceleration/accounting/profiling.py",
        "return (dim if is_cut else None), not is_cut",
        "return (dim if is_cut else None), False",
        "tests/unit/test_accounting.py::test_what_tensor_parallelism_cuts[adapters]",
    ),
    Mutation(
        "adapters forecast with a base that does not stream",
        "opensora/planner/forecast.py",
        'self.adapters.offload == "blocks"',
        'self.adapters.offload == "all"',
        "tests/unit/test_forecast_options.py::test_what_takes_less_memory[frozen blocks stream]",
    ),
    Mutation(
        "frozen weights with a gradient in the operations",
        "opensora/planner/forecast.py",
        "if not layer.trains)",
        "if layer.trains is None)",
        "tests/unit/test_forecast_options.py::test_what_takes_time",
    ),
    # Forecasts of forwards, caches, stills and validation; bytes of adapters and packs.
    Mutation(
        "a buffer is gone before the next unit is copied out of its own",
        PEAK_MEMORY,
        "self.copied = size if forward else 0",
        "self.copied = 0",
        FORECAST_BYTES.format("a_forward_takes_what_is_forecast[2-zero3 12]"),
    ),
    Mutation(
        "nothing stays gathered behind a forward of zero 2",
        PEAK_MEMORY,
        "    if place.cfg.zero == 3:\n        return 0",
        "    if place.cfg.zero >= 2:\n        return 0",
        FORECAST_TURNS.format("what_was_gathered_stays_below_zero_3"),
    ),
    Mutation(
        "whole weights shown where blocks stream",
        SAMPLING_FORECAST,
        'if job.offload != "blocks" or turn != DENOISER',
        'if job.offload != "none" or turn != DENOISER',
        FORECAST_TURNS.format("weights_are_those_on_the_device"),
    ),
    Mutation(
        "attention that a cache keeps forecast of one pass",
        SAMPLING_FORECAST,
        "copies * describe(model).width + mine * outputs",
        "copies * describe(model).width + outputs",
        FORECAST_BYTES.format("what_step_caches_keep[two kinds]"),
    ),
    Mutation(
        "clips behind stills forecast without their reference",
        "opensora/inference/memory.py",
        "job = job_of(clips_of(cfg), source)",
        "job = job_of(cfg, source)",
        FORECAST_TURNS.format("stills_have_turns_of_their_own"),
    ),
    Mutation(
        "a round of validation that does not fit",
        "opensora/planner/layout_forecast.py",
        "self.text, self.validation.peak if self.validation else 0)",
        "self.text)",
        FORECAST_TURNS.format("a_round_that_does_not_fit"),
    ),
    Mutation(
        "one picture for all samples of a micro-batch",
        "opensora/planner/forecast.py",
        'sizes["txt"], batch.picture], float)',
        'sizes["txt"], 0], float)',
        VIDEO_PLANS.format("every_sample_has_a_picture_of_its_own"),
    ),
    Mutation(
        "prompts sampled in a run without their pictures",
        "opensora/planner/validation_forecast.py",
        "for turn in (TEXT, IMAGE, AUTOENCODER))",
        "for turn in (TEXT, AUTOENCODER))",
        FORECAST_TURNS.format("rounds_of_validation_encode_pictures"),
    ),
    Mutation(
        "pictures of held-out clips take no time",
        "opensora/planner/validation_forecast.py",
        "text_flops(cfg.text, samples) + image_flops(cfg.image_encoder, samples)",
        "text_flops(cfg.text, samples)",
        FORECAST_TURNS.format("rounds_of_validation_encode_pictures"),
    ),
    Mutation(
        "features made ahead without tokens of pictures",
        "opensora/precompute.py",
        "image_encoder=image_encoder_of(cfg.image_encoder, None, device, dtype),",
        "image_encoder=None,",
        "tests/unit/test_features.py::test_tokens_of_first_frames_are_stored",
    ),
    Mutation(
        "keys that text encoders share before their own",
        "opensora/models/text/placement.py",
        "for name in (*own, *inherited):",
        "for name in (*inherited, *own):",
        "tests/unit/test_config_reference.py::test_the_document_is_up_to_date",
    ),
    Mutation(
        "a simulated device adds a mask as numbers",
        "tests/device/simulated.py",
        "_scaled_dot_product_attention_math(q, k, v, bias, *args",
        "_scaled_dot_product_attention_math(q, k, v, attn_mask, *args",
        "tests/device/test_attention.py::test_attention_is_that_of_the_cpu[keys]",
    ),
    Mutation(
        "held-out clips seen once for all bins",
        "opensora/planner/validation_forecast.py",
        "cfg.validate.bins * forward",
        "forward",
        FORECAST_TURNS.format("rounds_of_validation"),
    ),
    Mutation(
        "frozen weights sent by nobody",
        "acceleration/accounting/comm_volume.py",
        "sent = padded(unit.parameters, place)",
        "sent = padded((p for p in unit.parameters if p.trains), place)",
        "tests/dist/test_accounting.py::test_counted_is_predicted_of_adapters_and_packs[adapters]",
    ),
    # Open-Sora 1.0 to 1.3.
    Mutation(
        "known frames taken for noisy ones",
        "opensora/models/stdit/layers.py",
        "return None if known is None else ~known.any(dim=2)",
        "return None if known is None else known.any(dim=2)",
        "tests/unit/test_stdit.py::test_known_frames_in_the_place_of_noisy_ones[stdit3 debug]",
    ),
    Mutation(
        "the null text behind the mask of no prompt",
        "opensora/inference/pipeline.py",
        "read = [other if is_gone else own for own, other, is_gone in zip(texts, behind, gone, strict=True)]",
        "read = list(texts)",
        "tests/dist/test_stdit_sampling.py::test_layouts_sample_what_one_process_samples",
    ),
    Mutation(
        "a width that does not fit is named as the one that does",
        "opensora/models/base.py",
        "gives {width.size}; set model.{key}={width.size}",
        "gives {width.size}; set model.{key}={getattr(cfg, key)}",
        "tests/unit/test_stdit.py::test_widths_that_do_not_fit_are_named_with_those_that_do",
    ),
    Mutation(
        "positions of frames kept in the stream",
        STDIT,
        "h = x if frames is None else x + frames",
        "h = x = x if frames is None else x + frames",
        GOLDEN_STDIT.format("stdit_v1_0"),
    ),
    Mutation(
        "the step along time gated as known",
        STDIT,
        "gate = times.noisy_rows(self.scale_shift_table)[2]",
        "gate = times.rows(self.scale_shift_table)[2]",
        GOLDEN_STDIT.format("stdit_v1_2_xmask"),
    ),
    Mutation(
        "the last layer told the size of a clip",
        STDIT2,
        "self.final_layer(h, noisy, clean=",
        "self.final_layer(h, noisy + of_place, clean=",
        GOLDEN_STDIT.format("stdit2_v1_1"),
    ),
    Mutation(
        "queries normalised before they are rotated",
        STDIT2,
        "norm_after_rope=cfg.qk_norm_legacy",
        "norm_after_rope=False",
        GOLDEN_STDIT.format("stdit2_v1_1_qknorm_xmask"),
    ),
    Mutation(
        "the frame rate kept from known frames",
        STDIT3,
        "self.t_embedder(torch.zeros_like(timestep)) + told",
        "self.t_embedder(torch.zeros_like(timestep))",
        GOLDEN_STDIT.format("stdit3_v1_2_xmask"),
    ),
    Mutation(
        "known frames read the prompt",
        STDIT3,
        "given[:, list(mask_index)] = True",
        "given[:, list(mask_index)] = False",
        GOLDEN_STDIT.format("stdit3_v1_3_window_i2v"),
    ),
    Mutation(
        "rows of windows not scaled",
        STDIT3,
        "one[..., 1] % height / scale",
        "one[..., 1] % height",
        GOLDEN_STDIT.format("stdit3_v1_3_window_t2v"),
    ),
    Mutation(
        "windows of time as long as a clip",
        WINDOWS,
        "for size, window in zip(grid, (grid[0] if length < 0 else length, height, width), strict=True)",
        "for size, window in zip(grid, (grid[0], height, width), strict=True)",
        "tests/unit/test_stdit_planner.py::test_windows_are_padding_and_masks_written_out[grid0-window1]",
    ),
    Mutation(
        "places stretched by the smaller square",
        STDIT_LAYERS,
        "base_side(grid[1] * grid[2], nearest=True)",
        "base_side(grid[1] * grid[2])",
        GOLDEN_STDIT.format("stdit3_v1_3_window_t2v"),
    ),
    Mutation(
        "inputs of more channels not quartered",
        STDIT_FILES,
        "return tensor.repeat(1, 4) / 4",
        "return tensor.repeat(1, 4)",
        STDIT_START,
    ),
    Mutation(
        "channels of both outputs repeated as one",
        STDIT_FILES,
        "halves = tensor.unflatten(0, (2, -1))",
        "halves = tensor.unflatten(0, (1, -1))",
        STDIT_START,
    ),
    Mutation(
        "what fills up tokens is learned",
        STEP,
        "loss = torch.where(tokens.inside, loss, 0.0)",
        "loss = loss.clone()",
        "tests/unit/test_filled_up_sizes.py::test_the_loss_is_over_latents_alone[stdit3-elements]",
    ),
    Mutation(
        "images of Stable Diffusion without its factor",
        "opensora/models/vae/opensora_1x/sd.py",
        "draw(tuple(posterior.mean.shape[1:]))).float() * self.cfg.scale",
        "draw(tuple(posterior.mean.shape[1:]))).float() * FACTOR",
        "tests/unit/test_golden_autoencoders_1x.py::test_images[None-vae_spatial_scale_v1_3]",
    ),
    Mutation(
        "old names of queries and keys confused",
        "opensora/models/vae/opensora_1x/sd.py",
        '{"query": "to_q", "key": "to_k",',
        '{"query": "to_k", "key": "to_q",',
        "tests/unit/test_autoencoder_files.py::test_older_names_of_stable_diffusion",
    ),
    Mutation(
        "two zero frames where time is halved",
        "opensora/models/vae/opensora_1x/temporal_network.py",
        "3, (2, 1, 1), past=1)",
        "3, (2, 1, 1), past=2)",
        "tests/unit/test_golden_autoencoders_1x.py::test_temporal_network[vae_temporal_v1_2]",
    ),
    Mutation(
        "frames of 1.2 cut behind instead of in front",
        "opensora/models/vae/opensora_1x/temporal_network.py",
        "[:, :, -frames % self.sizes.ratio :]",
        "[:, :, : z.shape[2] * self.sizes.ratio - (-frames % self.sizes.ratio)]",
        "tests/unit/test_clip_coding.py::test_zero_frames_in_front_are_those_that_are_cut",
    ),
    Mutation(
        "both draws of 1.2 alike",
        "opensora/models/vae/opensora_1x/v1_2.py",
        'draw(tuple(posterior.mean.shape[1:]), "temporal")',
        'draw(tuple(posterior.mean.shape[1:]), "spatial")',
        "tests/unit/test_clip_coding.py::test_draws_belong_to_samples[opensora_v1_2]",
    ),
    Mutation(
        "shift and scale of 1.2 swapped in order",
        "opensora/models/vae/opensora_1x/v1_2.py",
        "return (z.float() - self.network.shift.float()) / self.network.scale.float()",
        "return z.float() / self.network.scale.float() - self.network.shift.float()",
        "tests/unit/test_golden_autoencoders_1x.py::test_clips_of_1_2",
    ),
    Mutation(
        "attention of 1.3 sees its own frame whole",
        "opensora/models/vae/opensora_1x/causal_network.py",
        ".tril(start)",
        ".tril(start + 1)",
        "tests/unit/test_clip_coding.py::test_causal_attention_in_runs[60]",
    ),
    Mutation(
        "what is upsampled added once",
        "opensora/models/vae/opensora_1x/causal_network.py",
        "return F.silu(self.norm2(self.conv2(h)) + x) + x",
        "return F.silu(self.norm2(self.conv2(h)) + x)",
        "tests/unit/test_golden_autoencoders_1x.py::test_clips_of_1_3",
    ),
    Mutation(
        "the later of two frames in common kept",
        "opensora/models/vae/opensora_1x/v1_3.py",
        "(before[:, :, -1:] + part[:, :, :1]) / 2",
        "part[:, :, :1]",
        "tests/unit/test_golden_autoencoders_1x.py::test_clips_of_1_3",
    ),
    Mutation(
        "a frame too few made for those asked for",
        "opensora/models/vae/opensora_1x/clip_coding.py",
        "if self.frames(count) >= frames and",
        "if self.frames(count) >= frames - 1 and",
        "tests/unit/test_clip_coding.py::test_as_many_frames_as_asked_for[1-opensora_v1_3-options4]",
    ),
    Mutation(
        "identity of stills learned in no stage",
        "opensora/models/vae/training/two_stages.py",
        "pixels.shape[2] == 1 and stage.identity",
        "pixels.shape[2] > 1 and stage.identity",
        "tests/unit/test_golden_autoencoder_training_1x.py::test_stages[1-image]",
    ),
    Mutation(
        "padding of T5 attended",
        "opensora/models/text/t5.py",
        "attention_mask=mask.long()",
        "attention_mask=None",
        "tests/unit/test_text_1x.py::test_t5_is_that_of_transformers[40]",
    ),
    Mutation(
        "the bias of a row given to all",
        "opensora/models/text/row_by_row.py",
        "    return torch.cat(values)\n",
        "    return first\n",
        "tests/unit/test_text_1x.py::test_rows_with_a_bias_of_their_own",
    ),
    Mutation(
        "CLIP's last row in place of the pooled one",
        "opensora/models/text/clip.py",
        "clip(input_ids=ids).pooler_output",
        "clip(input_ids=ids).last_hidden_state[:, -1]",
        "tests/unit/test_text_1x.py::test_clip_is_that_of_transformers",
    ),
    Mutation(
        "captions cleaned once",
        "opensora/models/text/caption_cleaning.py",
        "return clean_caption(clean_caption(text))",
        "return clean_caption(text).upper()",
        "tests/unit/test_text_1x.py::test_cleaning_is_the_published_one",
    ),
    Mutation(
        "no class is class 0",
        "opensora/models/text/classes.py",
        "        return num_classes\n",
        "        return 0\n",
        "tests/unit/test_text_1x.py::test_classes",
    ),
    Mutation(
        "labels of dropped samples kept",
        "opensora/conditioning/dropout.py",
        "torch.where(dropped, num_classes, labels)",
        "labels",
        "tests/unit/test_text_1x.py::test_dropped_prompts_in_training",
    ),
    Mutation(
        "no prompt behind the mask of the empty one",
        "opensora/inference/pipeline.py",
        "if learned and behind is not None:",
        "if not learned and behind is not None:",
        "tests/unit/test_text_1x.py::test_no_prompt_in_sampling",
    ),
    Mutation(
        "captions cleaned for T5 in training alone",
        "opensora/models/text/t5.py",
        'return cleaned(prompt, self.cfg.clean == "sampling")',
        'return cleaned(prompt, self.cfg.clean == "always")',
        "tests/unit/test_text_1x.py::test_when_captions_are_cleaned[t5]",
    ),
    Mutation(
        "frames of references aligned upwards at half",
        PLACED,
        "if 2 * beyond > align and",
        "if 2 * beyond >= align and",
        f"{PLACED_TEST}any_strategy_is_applied_by_the_rules",
    ),
    Mutation(
        "lengths of a strategy that pass the end of the reference",
        PLACED,
        "count = min(placed.length, latent_frames - start, length - first)",
        "count = min(placed.length, latent_frames - start)",
        f"{PLACED_TEST}strategies_are_applied_as_published[1.2]",
    ),
    Mutation(
        "the tail of the last clip from the first reference",
        PLACED,
        'second = len(reference_lengths) > 1 and (kind == "i2v_loop" or clip > 0)',
        'second = len(reference_lengths) > 1 and kind == "i2v_loop"',
        f"{PLACED_TEST}kinds_of_1_3_give_the_published_frames",
    ),
    Mutation(
        "parts of prompts a clip late",
        "opensora/inference/opensora_1x/prompts.py",
        "if index <= clip][-1]",
        "if index < max(clip, 1)][-1]",
        f"{PLACED_TEST}parts_of_prompts_are_those_published[1.2]",
    ),
    Mutation(
        "scores said twice",
        "opensora/inference/opensora_1x/prompts.py",
        "if value is not None and phrase not in prompt:",
        "if value is not None:",
        f"{PLACED_TEST}scores_are_written_as_published[1.3]",
    ),
    Mutation(
        "one noise for all clips of a video",
        LONG_CLIPS,
        'return seed if clip == 0 else derive_key(seed, "clip", clip)',
        "return seed",
        f"{LONG_TEST}[latents]",
    ),
    Mutation(
        "clips joined with the frames that they have from the ones before",
        LONG_CLIPS,
        "latents = torch.cat([one.latents[:, :, length if number else 0 :]",
        "latents = torch.cat([one.latents[:, :, length - 1 if number else 0 :]",
        f"{LONG_TEST}[latents]",
    ),
    Mutation(
        "free frames that begin as those of the reference",
        "opensora/inference/pipeline.py",
        "(edit_ratios < 1)[:, None, :, None, None]",
        "(edit_ratios <= 1)[:, None, :, None, None]",
        f"{LONG_TEST}[masked]",
    ),
    Mutation(
        "clips that go on from the first frames of the ones before",
        PLACED,
        "Source(PREVIOUS, latent_frames - length + frame)",
        "Source(PREVIOUS, frame)",
        f"{LONG_TEST}[beside]",
    ),
    Mutation(
        "oscillation of 1.3 for text alone",
        "opensora/config/family/jobs.py",
        'key, value = t.first(f"use_oscillation_guidance_for_{name}", both)',
        'key, value = t.first(f"use_oscillation_guidance_for_{name}", both if name == "text" else "")',
        "tests/unit/test_family_configs.py::test_what_clips_are_given[opensora-v1-3/inference/t2v.py]",
    ),
    # Parts of files of 1.x
    Mutation(
        "a file without a scheduler trains as Open-Sora 2",
        FAMILY_MODELS,
        'if t.get(f"{section}.type") is None:',
        'if section != "scheduler" and t.get(f"{section}.type") is None:',
        PARTS_OF_FILES.format("a_part_without_its_type_is_missing"),
    ),
    Mutation(
        "guidance of 1.x is that of Open-Sora 2",
        FAMILY_MODELS,
        't.put("sampling.guidance", 4.0, "scheduler.type")',
        't.put("sampling.guidance", 7.5, "scheduler.type")',
        PARTS_OF_FILES.format("what_a_scheduler_does_not_say_is_as_the_family_has_it"),
    ),
    Mutation(
        "prompts are longer than the model reads",
        FAMILY_MODELS,
        "(length := _read_by_model(t) if length is None else length) is not None",
        "length is not None",
        PARTS_OF_FILES.format("prompts_are_as_long_as_the_model_reads"),
    ),
    Mutation(
        "files of 1.1 have habits of 1.0",
        FAMILY_MODELS,
        ' and not later else "1.1"',
        ' else "1.1"',
        PARTS_OF_FILES.format("habits_are_those_of_the_first_release_that_can_read_a_file"),
    ),
    Mutation(
        "a solver trains",
        FAMILY_MODELS,
        'if t.is_training and t.given["scheduler.type"] == "dpm-solver":',
        "if False:",
        PARTS_OF_FILES.format("a_solver_is_no_training"),
    ),
    Mutation(
        "a resolution that is given twice is taken once",
        "opensora/config/family/data.py",
        "if ours in found or len(",
        "if len(",
        PARTS_OF_FILES.format("a_shape_given_twice_is_refused"),
    ),
    Mutation(
        "an objective that a run was not trained with",
        "opensora/inference/find.py",
        "cfg.objective.kind != saved.objective.kind",
        'cfg.objective.kind == ""',
        PARTS_OF_FILES.format("a_run_is_sampled_by_its_own_objective"),
    ),
    Mutation(
        "prompts of a file win over the command line",
        FAMILY_JOBS,
        'if t.over(path_key, "prompt"):',
        "if False:",
        "tests/unit/test_family_flags.py::test_prompts_of_the_command_line_win_over_the_files",
    ),
    # Kernels of apex
    Mutation(
        "apex counts all parameters as one",
        FUSED,
        "by_count.setdefault(updates, [])",
        "by_count.setdefault(0 * updates, [])",
        BY_APEX.format("settings_of_a_step_are_those_of_the_group"),
    ),
    Mutation(
        "apex gets parameters of nothing",
        FUSED,
        "if local(p).numel()]",
        "]",
        BY_APEX.format("parameters_without_a_gradient_count_for_themselves"),
    ),
    Mutation(
        "a counter that was read is not looked at again",
        FUSED,
        " or known.version != tensor._version",
        "",
        BY_APEX.format("state_that_somebody_wrote_is_read"),
    ),
    Mutation(
        "apex goes on with the first learning rate",
        FUSED,
        "{name: group[name] for name in SETTINGS}",
        "{name: group[name] for name in SETTINGS[1:]}",
        BY_APEX.format("settings_of_a_step_are_those_of_the_group"),
    ),
    Mutation(
        "apex decays with the gradient",
        APEX,
        "adam_w_mode=True",
        "adam_w_mode=False",
        BY_APEX.format("training_steps_equal_those_of_torch[1-mesh0-0]"),
    ),
    Mutation(
        "epsilon of RMS norms by apex",
        NORMS,
        "module.gain, module.eps)",
        "module.gain, 1e-5)",
        BY_APEX.format("every_norm_of_every_model_is_replaced[stdit3]"),
    ),
    Mutation(
        "norms with weights stay torch's",
        NORMS,
        "isinstance(module, nn.LayerNorm):",
        "isinstance(module, nn.LayerNorm) and not module.elementwise_affine:",
        BY_APEX.format("every_norm_of_every_model_is_replaced[pixart_kv]"),
    ),
    Mutation(
        "a package of the name is taken for apex",
        APEX,
        " or find_spec(EXTENSIONS[part]) is None",
        "",
        BY_APEX.format("auto_takes_apex_where_it_can_run"),
    ),
    Mutation(
        "the autoencoder of 1.3 with our defaults",
        FAMILY_MODELS,
        '"vae.temporal_overlap": ("vae.temporal_overlap", False)',
        '"vae.temporal_overlap": ("vae.temporal_overlap", True)',
        FAMILY_FILES.format("what_a_file_leaves_out_of_the_autoencoder_of_1_3"),
    ),
    Mutation(
        "no piece of 1.2 is as no word of it",
        FAMILY_MODELS,
        't.given.get("vae.micro_frame_size", 17) is None',
        "False",
        FAMILY_FILES.format("pieces_of_the_autoencoder_of_1_2"),
    ),
    Mutation(
        "a job's own model is not that of the run",
        "opensora/inference/find.py",
        "if key not in free:",
        'if key == "kind":',
        "tests/integration/test_saved_run.py::test_the_model_of_a_job_is_that_of_the_run",
    ),
    Mutation(
        "norms that a file names are not chosen",
        FAMILY_MODELS,
        '"auto" if t.given[key] else "torch", key)',
        '"torch", key)',
        FAMILY_FILES.format("kernels_are_those_that_a_file_names"),
    ),
    # Clips of raw videos, their captions and their table.
    Mutation(
        "a clip begins a frame too late",
        "data_pipeline/stages/cut.py",
        "self._make(reader, path, first + shown.frames",
        "self._make(reader, path, first + 1 + shown.frames",
        "tests/unit/test_cut.py::test_a_clip_is_its_frames_and_no_others",
    ),
    Mutation(
        "frames of a variable rate by their numbers",
        "data_pipeline/media/rates.py",
        "return ConstantRate(rate, _nearest(times, moments))",
        "return ConstantRate(rate, np.linspace(0, count - 1, len(moments)).astype(np.int64))",
        "tests/unit/test_cut.py::test_a_variable_rate_becomes_constant_by_times",
    ),
    Mutation(
        "a damaged clip is taken for whole",
        "data_pipeline/media/clip_file.py",
        "if box != _HEAD + digest.digest():",
        "if not box.startswith(_HEAD):",
        "tests/unit/test_cut.py::test_a_clip_that_is_there_is_not_made_again_and_a_damaged_one_is",
    ),
    Mutation(
        "a pause shorter than the server asks for",
        "data_pipeline/captioning/endpoint.py",
        "return max(asked or 0.0, min(",
        "return min(asked or 60.0, min(",
        "tests/unit/test_pipeline_captions.py::test_pauses_grow_and_are_never_shorter_than_the_server_asks",
    ),
    Mutation(
        "all captions are asked for again",
        "data_pipeline/stages/captions.py",
        'if before is not None or cut["path"] is None:',
        'if cut["path"] is None:',
        "tests/unit/test_pipeline_captions.py::test_nothing_is_lost_and_only_what_failed_is_asked_again",
    ),
    Mutation(
        "clips of an archive lie a header further",
        "data_pipeline/media/storage.py",
        "offsets.append(at + _TAR_BLOCK)",
        "offsets.append(at + 2 * _TAR_BLOCK)",
        "tests/unit/test_clip_table.py::test_archives_hold_the_same_clips",
    ),
    Mutation(
        "rows of a table in order of shards",
        "data_pipeline/table.py",
        'return whole.sort_by([("source", "ascending"), ("start_s", "ascending"), ("clip_id", "ascending")])',
        "return whole",
        "tests/unit/test_clip_table.py::test_a_row_for_every_clip_and_every_source",
    ),
    Mutation(
        "rejected clips are trained with",
        "opensora/datasets/table/table_files.py",
        "return raw.filter(pa.array(keep)), numbers[keep]",
        "return raw, numbers",
        "tests/unit/test_kept_rows.py::test_a_table_of_which_nothing_is_kept",
    ),
    Mutation(
        "faults name the row among those that are kept",
        "opensora/datasets/table/table_files.py",
        "return raw.filter(pa.array(keep)), numbers[keep]",
        "return raw.filter(pa.array(keep)), numbers[: keep.sum()]",
        "tests/unit/test_kept_rows.py::test_faults_name_the_row_of_the_file[csv]",
    ),
    Mutation(
        "a zoom in is called a zoom out",
        "data_pipeline/quality/camera.py",
        '("zoom in", "zoom out")',
        '("zoom out", "zoom in")',
        CAMERA.format("names_of_motions[zoom in]"),
    ),
    Mutation(
        "the camera takes part in what moves in front of it",
        "data_pipeline/analysis/motion.py",
        "if _is_at_rest(moved - points, _flow_of(matrix, points)):",
        "if False:",
        CAMERA.format("a_camera_rests_where_most_texture_is_on_something_that_moves"),
    ),
    Mutation(
        "neighbouring frames are compared",
        "data_pipeline/analysis/motion.py",
        "self._first[1] + self._config.gap_s",
        "self._first[1]",
        CAMERA.format("frames_that_come_twice_do_not_look_still"),
    ),
    Mutation(
        "speeds depend on the rate",
        "data_pipeline/analysis/motion.py",
        "scale = 1 / (max(after.shape) * (frame.time_s - time_s))",
        "scale = 15 / max(after.shape)",
        CAMERA.format("the_camera_s_motion_is_measured[(0.05, 0, 0, 0)-12.0]"),
    ),
    Mutation(
        "a bright spot in the dark has bars",
        "data_pipeline/quality/bars.py",
        "(dim - dark <= _STEEP)",
        "(dim - dark <= 1)",
        LUMA.format("a_bright_spot_in_the_dark_has_no_bars"),
    ),
    Mutation(
        "a freeze is counted in frames",
        "data_pipeline/stages/measure.py",
        'times = (pts - pts[0]) * float(Fraction(frames["time_base"]))',
        "times = np.arange(len(pts)) / 10",
        MEASURE.format("frozen_is_a_share_of_time_at_a_variable_rate"),
    ),
    Mutation(
        "damage is of the whole file",
        "data_pipeline/stages/measure.py",
        "((damage >= first) & (damage < last)).any()",
        "len(damage)",
        MEASURE.format("damage_is_of_the_clip_that_has_it"),
    ),
    Mutation(
        "mirrored pictures have the hashes of turned ones",
        "data_pipeline/analysis/hashes.py",
        "for h in range(1, _LOW, 2)",
        "for h in range(0, _LOW, 2)",
        "tests/unit/test_hashes.py::test_the_hash_of_the_mirrored_picture_follows",
    ),
    Mutation(
        "other moments of a room are duplicates",
        "data_pipeline/matching/align.py",
        "left / (changes + _FLOOR)",
        "left / (changes + 1e4)",
        "tests/unit/test_duplicates.py::test_moments_are_told_apart_by_what_changes",
    ),
    Mutation(
        "all of the picture counts as what moves",
        "data_pipeline/matching/motion.py",
        "cells = np.maximum(moved, also) >= _MOVES",
        "cells = np.maximum(moved, also) >= 0",
        "tests/unit/test_duplicates.py::test_motion_is_of_the_cells_that_move",
    ),
    Mutation(
        "what moves is not asked for",
        "data_pipeline/stages/duplicates.py",
        "left = like.unexplained if motion.unexplained is None else motion.unexplained",
        "left = like.unexplained",
        "tests/unit/test_duplicates.py::test_what_little_moves_tells_moments_of_an_empty_room_apart",
    ),
    Mutation(
        "the motion that is cut off is forgotten",
        "data_pipeline/stages/duplicates.py",
        "motion.within < _WITHIN or ",
        "",
        "tests/unit/test_duplicates.py::test_what_both_show_must_have_their_motion",
    ),
    Mutation(
        "two stills of one file are copies",
        "data_pipeline/stages/duplicates.py",
        "(motion.unexplained is None and of_one_file)",
        "False",
        "tests/unit/test_duplicates.py::test_what_stands_still_is_judged_by_its_picture",
    ),
    Mutation(
        "an edge along the way of a camera is a mark",
        "data_pipeline/overlays/logo.py",
        "_ACROSS = 0.1",
        "_ACROSS = -1.0",
        "tests/unit/test_overlays.py::test_an_edge_along_the_way_of_a_camera_is_no_mark",
    ),
    Mutation(
        "marks are told where the camera stands",
        "data_pipeline/stages/text.py",
        'if measured.get("camera_motion") != STATIC else',
        'if measured.get("camera_motion") != "stands" else',
        "tests/unit/test_overlays.py::test_a_camera_that_stands_says_nothing_of_marks_whatever_moves",
    ),
    Mutation(
        "text of one file is that of another as long",
        "data_pipeline/stages/text.py",
        '"shots": ("clip_id", "first", "last"),',
        '"shots": ("first", "last"),',
        "tests/unit/test_pipeline_keys.py::test_whoever_opens_a_file_has_its_content_in_the_key",
    ),
    Mutation(
        "the worst of a group is kept",
        "data_pipeline/stages/duplicates.py",
        "best = min(members, key=clips.rank)",
        "best = max(members, key=clips.rank)",
        "tests/unit/test_duplicates.py::test_the_one_of_most_bits_times_pixels_is_kept",
    ),
    Mutation(
        "bars count as pixels",
        "data_pipeline/matching/clip_list.py",
        ' * _numbers(self._rows["measure"]["picture_share"])',
        "",
        "tests/unit/test_duplicates.py::test_bars_are_no_pixels",
    ),
    Mutation(
        "who is mirrored is forgotten in a group",
        "data_pipeline/matching/groups.py",
        "turned ^ other_turned ^ mirrored",
        "mirrored",
        "tests/unit/test_duplicates.py::test_groups_know_who_is_mirrored",
    ),
    Mutation(
        "any overlap is enough",
        "data_pipeline/matching/candidates.py",
        "shared = _overlap(prints, pairs) >= overlap",
        "shared = _overlap(prints, pairs) >= 0",
        "tests/unit/test_duplicates.py::test_how_much_both_must_show",
    ),
    Mutation(
        "a single letter is text",
        "data_pipeline/stages/text.py",
        " and len(each.text) >= cfg.letters",
        "",
        "tests/unit/test_overlays.py::test_what_looks_like_letters_is_none",
    ),
    Mutation(
        "a box of the whole picture is text",
        "data_pipeline/overlays/reading.py",
        " if each.share <= _LARGEST",
        "",
        "tests/unit/test_overlays.py::test_a_box_of_the_whole_picture_is_no_text",
    ),
    Mutation(
        "text in bars counts",
        "data_pipeline/stages/text.py",
        "_inside(each.bgr, bars)",
        "each.bgr",
        "tests/unit/test_overlays.py::test_bars_are_cut_away_before",
    ),
    Mutation(
        "duplicates are read",
        "data_pipeline/stages/text.py",
        'row["duplicate_of"] is None for row in copies',
        "True for row in copies",
        "tests/unit/test_overlays.py::test_only_clips_that_are_kept_and_no_duplicates[more2-False]",
    ),
    Mutation(
        "what stands still is a mark",
        "data_pipeline/overlays/logo.py",
        "_ALIVE = 0.7",
        "_ALIVE = 0.0",
        "tests/unit/test_overlays.py::test_a_camera_at_rest_says_nothing_of_marks",
    ),
    Mutation(
        "pipeline: a worker is started by a thread of the stage",
        "data_pipeline/engines/local.py",
        "self._threads.submit(self._work, worker, queue)",
        'ThreadPoolExecutor(1, "stage").submit(self._work, worker, queue)',
        PIPELINE_LOCAL + "workers_outlive_a_stage",
    ),
    Mutation(
        "pipeline: short sources first",
        "data_pipeline/shard.py",
        "key=self.weight, reverse=True)",
        "key=self.weight)",
        PIPELINE_LOCAL + "long_sources_come_first",
    ),
    Mutation(
        "pipeline: memory that others left is put down to a source",
        "data_pipeline/worker.py",
        """        if fresh:
            raise Failed("memory", value)
        return self.run(stage, unit)""",
        """        raise Failed("memory", value)
        return self.run(stage, unit)""",
        PIPELINE_LOCAL + "memory_that_others_hold_is_no_source_s_fault",
    ),
    Mutation(
        "pipeline: a journal is written on behind damage",
        "data_pipeline/journal.py",
        "self._file.truncate(end)",
        "pass",
        "tests/unit/test_pipeline_journal.py::test_every_cut_and_every_damaged_region_costs_only_what_is_behind_it",
    ),
    Mutation(
        "pipeline: a lock on a journal that is gone",
        "data_pipeline/journal.py",
        "if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):",
        "if self._file:",
        "tests/unit/test_pipeline_journal.py::test_one_that_is_removed_before_it_is_locked_is_opened_again",
    ),
    Mutation(
        "pipeline: what was done before counts for the time left",
        "opensora/utils/console.py",
        "        self._initial += steps\n        if self._bar",
        "        if self._bar",
        PIPELINE_LOCAL + "time_that_is_left_is_by_size_and_without_what_was_done",
    ),
    Mutation(
        "filters: a value at its threshold is rejected",
        "data_pipeline/stages/filter.py",
        "value < self.min:",
        "value <= self.min:",
        FILTERS + "a_range",
    ),
    Mutation(
        "filters: what nobody measured is missing",
        "data_pipeline/stages/filter.py",
        "column.position > reached",
        "column.position > 99",
        FILTERS + "the_verdict_of_the_screen_comes_first",
    ),
    Mutation(
        "filters: their order is not part of the key",
        "data_pipeline/stages/filter.py",
        "for name, (rule, _) in rules.items()]\n",
        "for name, (rule, _) in sorted(rules.items(), key=lambda item: item[0])]\n",
        FILTERS + "stages_of_filters_are_keyed_by_rules_and_their_order_and_go_to_workers",
    ),
    Mutation(
        "pictures: another second begins behind a gap",
        "data_pipeline/analysis/base.py",
        "self._step * (math.floor((frame.time_s + 1e-9) / self._step) + 1)",
        "self._next + self._step",
        "tests/unit/test_pictures.py::test_of_a_variable_rate_no_second_has_more",
    ),
    Mutation(
        "report: a clip is dropped by every filter that rejects it",
        "data_pipeline/report/funnel.py",
        "amounts = (left, first,",
        "amounts = (left, rejected,",
        REPORT + "the_funnel_counts_each_clip_where_it_is_rejected_first",
    ),
    Mutation(
        "report: misses by how many filters reject them",
        "data_pipeline/report/clips.py",
        "np.lexsort((rows, others, distance))",
        "np.lexsort((rows, distance, others))",
        REPORT + "the_nearest_misses_are_in_order_of_their_distance_to_the_threshold",
    ),
    Mutation(
        "report: a shot has the picture behind its end",
        "data_pipeline/report/collect.py",
        "(frames < shot.last)",
        "(frames <= shot.last)",
        REPORT + "the_picture_of_a_shot_is_the_one_nearest_its_middle",
    ),
    Mutation(
        "report: names of files are HTML",
        "data_pipeline/report/markup.py",
        "<span>{escape(below)}</span>",
        "<span>{below}</span>",
        REPORT + "names_from_outside_are_text_and_nothing_else",
    ),
    Mutation(
        "scores: weights that a model lacks are drawn",
        "data_pipeline/scoring/clip.py",
        'about["missing_keys"]',
        "[]",
        SCORES + "a_model_without_all_of_its_weights[a weight less]",
    ),
    Mutation(
        "scores: embeddings have any length",
        "data_pipeline/scoring/clip.py",
        "wide / np.linalg.norm(wide, axis=-1, keepdims=True)",
        "wide",
        SCORES + "an_aesthetic_score_is_the_head_of_the_embedding",
    ),
    Mutation(
        "scores: duplicates are looked at",
        "data_pipeline/stages/scores.py",
        "keep and copy is None for keep, copy",
        "keep for keep, copy",
        SCORES + "what_is_rejected_or_a_duplicate_is_not_looked_at",
    ),
    Mutation(
        "a threshold that lets one clip pass has all of its video read again",
        "data_pipeline/shard.py",
        "self._known_rows.get(each) for each",
        "None for each",
        "tests/unit/test_rows_again.py::test_a_clip_that_a_threshold_lets_pass_costs_itself_alone",
    ),
    Mutation(
        "rows that failed are taken over where they are tried again",
        "data_pipeline/shard.py",
        "if not has_failed_before:",
        "if True:",
        "tests/unit/test_rows_again.py::test_only_rows_that_failed_are_tried_again",
    ),
    Mutation(
        "page: seeds as numbers of JavaScript",
        f"{PAGE}/api.js",
        """'"seed":"$1"'""",
        """'"seed":$1'""",
        PAGE_TEST.format("use_again_makes_the_same_job"),
    ),
    Mutation(
        "page: the same request sent again is another job",
        f"{PAGE}/form.js",
        "if (this.#once?.body !== body)",
        "if (body)",
        PAGE_TEST.format("an_answer_that_is_lost_makes_no_second_job"),
    ),
    Mutation(
        "page: prompts as HTML",
        f"{PAGE}/queue.js",
        'row.querySelector(".prompt").textContent =',
        'row.querySelector(".prompt").innerHTML =',
        PAGE_ACCESS.format("hostile_prompts_are_text"),
    ),
    Mutation(
        "page: one of two clips is moved",
        f"{PAGE}/compare.js",
        "for (const clip of this.#clips) clip.currentTime = Math.min",
        "for (const clip of this.#clips.slice(1)) clip.currentTime = Math.min",
        PAGE_TEST.format("side_by_side"),
    ),
    Mutation(
        "page: a crowd of another client's jobs is cut off",
        f"{PAGE}/jobs.js",
        "first || !page.has_more ||",
        "first || page.has_more ||",
        PAGE_TEST.format("what_is_deleted_elsewhere_goes_and_what_is_older_comes"),
    ),
    Mutation(
        "page: soft text too soft",
        f"{PAGE}/page.css",
        "--soft: #5c5a55;",
        "--soft: #8f8d88;",
        PAGE_ACCESS.format("contrast[light]"),
    ),
    Mutation(
        "page: progress without a name",
        f"{PAGE}/queue.js",
        'row.querySelector("progress").setAttribute("aria-label", `Progress of: ${short(job.prompt)}`);',
        "",
        PAGE_ACCESS.format("every_control_has_a_name"),
    ),
    Mutation(
        "a request of another key finds the job",
        "opensora/serve/web/videos.py",
        "job = service.job(id, client.owner) if ID.fullmatch(id) else None",
        "job = service.job(id, None) if ID.fullmatch(id) else None",
        f"{API}jobs_of_another_key_are_out_of_sight",
    ),
    Mutation(
        "a clip is sent before its job is completed",
        "opensora/serve/web/videos.py",
        'if job.state != "completed":',
        "if False:",
        f"{API}nothing_is_sent_before_it_is_whole",
    ),
    Mutation(
        "a key that begins like one is that key",
        "opensora/serve/web/auth.py",
        "hmac.compare_digest(known, digest)]",
        "True]",
        f"{WEB}keys",
    ),
    Mutation(
        "a host's name is not looked at",
        "opensora/serve/web/auth.py",
        "if self._hosts is not None and _name",
        "if False and _name",
        f"{WEB}origins",
    ),
    Mutation(
        "a body has no limit while it is read",
        "opensora/serve/web/body.py",
        "        if size > most:\n            raise too_large\n",
        "",
        f"{WEB}a_body_is_read_up_to_its_limit",
    ),
    Mutation(
        "a range ends a byte too late",
        "opensora/serve/web/content.py",
        "stop = min(size, int(found[2]) + 1) if found[2] else size",
        "stop = min(size, int(found[2]) + 2) if found[2] else size",
        f"{WEB}ranges_put_together_are_the_file",
    ),
    Mutation(
        "jobs of another guidance share a batch",
        "opensora/serve/request.py",
        'if name != "seed"}\n    # the published',
        'if name not in ("seed", "guidance")}\n    # the published',
        "tests/unit/test_serve_request.py::test_jobs_of_one_batch_differ_in_seed_and_prompt_alone",
    ),
    Mutation(
        "a deleted job that runs is forgotten while its files come",
        "opensora/serve/web/cleanup.py",
        "        elif job.state in FINISHED:\n            remove(service, job)\n        elif",
        "        elif",
        f"{WEB}a_job_that_was_deleted_goes_when_it_has_ended",
    ),
    Mutation(
        "frames of a gradual transition stay in clips",
        "data_pipeline/shots/ranges.py",
        'beside = margin if each.kind == "gradual" else 0',
        "beside = 0",
        "tests/unit/test_shots.py::test_frames_around_a_gradual_transition_are_in_no_clip",
    ),
    Mutation(
        "a clip's id is of rounded seconds",
        "data_pipeline/shots/ranges.py",
        '"clip_id": clip_id(sha256, start * times.base, end * times.base),',
        '"clip_id": clip_id(sha256, round(start * times.base, 3), round(end * times.base, 3)),',
        "tests/unit/test_shots.py::test_times_are_exact",
    ),
    Mutation(
        "stored scores are one frame late",
        "data_pipeline/shots/cuts.py",
        "self._scores = iter(scores.tolist())",
        "self._scores = iter([0.0, *scores.tolist()])",
        "tests/unit/test_shots.py::test_cuts_are_those_of_pyscenedetect",
    ),
    Mutation(
        "a flash is a cut",
        "data_pipeline/shots/opinions.py",
        "cuts = [cut for cut in cuts if not is_refuted(thumbs, cut, times[cut])]",
        "cuts = list(cuts)",
        "tests/unit/test_gradual_shots.py::test_a_flash_between_is_no_transition",
    ),
    Mutation(
        "who goes past is a transition",
        "data_pipeline/shots/gradual.py",
        "if sure > _CERTAIN or not _returns(thumbs, start, stop):",
        "if True:",
        "tests/unit/test_gradual_shots.py::test_what_comes_back_is_no_transition",
    ),
    Mutation(
        "cuts between shots that look alike are not looked for",
        "data_pipeline/shots/opinions.py",
        "    for step in steps:",
        "    for step in ():",
        "tests/unit/test_gradual_shots.py::test_a_step_to_a_like_scene_is_a_cut",
    ),
    Mutation(
        "two steps are two cuts, however close",
        "data_pipeline/shots/opinions.py",
        "is_alone = all(abs(times[step] - times[cut]) >= max(apart_s, _NEAR_S) for cut in sudden)",
        "is_alone = True",
        "tests/unit/test_gradual_shots.py::test_steps_close_to_a_cut_are_part_of_it",
    ),
    Mutation(
        "another light is another shot",
        "data_pipeline/shots/verdict.py",
        "> (_UNMOVED if _is_step(before, after) else _MOVED):",
        "> (2.0 if _is_step(before, after) else _MOVED):",
        "tests/unit/test_gradual_shots.py::test_a_step_that_changes_little_for_good_is_none",
    ),
    Mutation(
        "a flash while the view moves is a cut",
        "data_pipeline/shots/verdict.py",
        "> (_UNMOVED if _is_step(before, after) else _MOVED):",
        "> 2.0:",
        "tests/unit/test_gradual_shots.py::test_a_flash_that_no_thumbnail_shows_is_no_cut_of_a_moving_view",
    ),
    Mutation(
        "who moves at once makes a cut",
        "data_pipeline/shots/verdict.py",
        "return share < _FOR_GOOD or (share < _OTHER and _detour(before, after) > _AWAY)",
        "return share < _OTHER and _detour(before, after) > _AWAY",
        "tests/unit/test_gradual_shots.py::test_a_step_that_changes_little_for_good_is_none",
    ),
    Mutation(
        "service: adapters of a turn change what is kept of the weights before them",
        "acceleration/sharding/adapter_swap.py",
        "to(self.device, copy=True).addmm_",
        "to(self.device).addmm_",
        "tests/dist/test_adapter_swap.py::test_weights_are_those_of_a_model_built_with_them[1-mesh0-fp32]",
    ),
    Mutation(
        "service: a group that stands still keeps its leases",
        "opensora/serve/worker/lease.py",
        "if held and now - self._moved > self._hang_s:",
        "if not held and now - self._moved > self._hang_s:",
        "tests/unit/test_serve_lease.py::test_a_group_that_stands_still_loses_its_leases_and_leaves",
    ),
    Mutation(
        "service: all data-parallel groups make the first jobs of a batch",
        "opensora/serve/worker/sampler.py",
        "first = sum(shares[: mesh.data_rank])",
        "first = 0",
        "tests/faults/test_service_group.py::test_a_batch_over_data_parallel_groups",
    ),
    Mutation(
        "service: a job that runs when the group stops is cancelled",
        "opensora/serve/worker/desk.py",
        "return Flag.PUT_BACK",
        "return Flag.CANCELLED",
        "tests/faults/test_service_group.py::test_asked_to_stop_while_it_samples",
    ),
    Mutation(
        "service: small pictures of a clip that could not be written stay",
        "opensora/serve/worker/loop.py",
        "            self.store.remove(job.id)\n",
        "",
        "tests/faults/test_service_group.py::test_full_disk",
    ),
    Mutation(
        "service: a child that was asked to end is killed at once",
        "opensora/serve/supervisor.py",
        "child.ask(signal.SIGTERM)",
        "child.ask(signal.SIGKILL)",
        "tests/unit/test_serve_supervisor.py::test_ctrl_c_ends_all_children",
    ),
    Mutation(
        "a row is known by what all clips of its video share",
        "data_pipeline/outputs.py",
        "{name: [row] for name, row in zip(of_clips, clip, strict=True)}",
        "{name: [] for name, _ in zip(of_clips, clip, strict=True)}",
        "tests/unit/test_rows_again.py::test_a_clip_that_a_threshold_lets_pass_costs_itself_alone",
    ),
    Mutation(
        "a row is taken over though its video was decoded anew",
        "data_pipeline/outputs.py",
        "return [unit_key(of_source, {name",
        "return [unit_key(stage_key, {name",
        "tests/unit/test_rows_again.py::test_what_all_clips_share_makes_all_of_them_again",
    ),
    Mutation(
        "clips that come out of archives lack a byte",
        "data_pipeline/media/storage.py",
        "aside.write_bytes(content)",
        "aside.write_bytes(content[:-1])",
        "tests/unit/test_clip_table.py::test_archives_become_files_again_without_encoding",
    ),
    Mutation(
        "--check looks at sizes alone",
        "data_pipeline/table.py",
        "is_there(out, place, size) and (not check or is_whole(out, place, sha256))",
        "is_there(out, place, size)",
        "tests/unit/test_clip_table.py::test_check_reads_every_clip_and_cuts_again_what_is_damaged[files]",
    ),
    Mutation(
        "--check leaves an archive as it is",
        "data_pipeline/media/storage.py",
        "if is_short or (check and not",
        "if is_short or (False and not",
        "tests/unit/test_clip_table.py::test_check_reads_every_clip_and_cuts_again_what_is_damaged[tar]",
    ),
    Mutation(
        "archives of another command go",
        "data_pipeline/media/storage.py",
        "not in named and archive.stat().st_mtime_ns < written",
        "not in named and written",
        "tests/unit/test_clip_table.py::test_a_kill_on_the_way_from_one_archive_to_the_next_loses_no_clip[write_table]",
    ),
    Mutation(
        "a stage reads all columns of what comes before it",
        "data_pipeline/shard.py",
        "    output = read_output(path, columns)",
        "    output = read_output(path)",
        "tests/unit/test_pipeline_local.py::test_a_stage_reads_the_columns_that_it_declares",
    ),
    Mutation(
        "frames hold themselves",
        "opensora/datasets/decode/pyav_pixels.py",
        "Any = SideDataContainer(frame)",
        "Any = frame.side_data",
        "tests/unit/test_media_scan.py::test_a_frame_is_freed_with_the_next_one",
    ),
    Mutation(
        "models stay in a process that needs them no more",
        "data_pipeline/worker.py",
        "self._last in self._with_models",
        "self._last in ()",
        "tests/unit/test_pipeline_local.py::test_what_comes_behind_models_begins_in_a_process_without_them",
    ),
    Mutation(
        "paths are read as YAML",
        "opensora/config/load.py",
        '(text.startswith("[") and any(map(wants_list, hints)))',
        "any(map(wants_list, hints))",
        "tests/unit/test_overrides_as_text.py::test_a_folder_may_be_called_anything[2024]",
    ),
    Mutation(
        "a solver that does not fit is a job that fails",
        "opensora/serve/request.py",
        "    _check_solver(option, info, called)",
        "    pass",
        "tests/unit/test_serve_request.py::test_solvers_are_those_of_the_command",
    ),
    Mutation(
        "latents of Wan are scaled before they are centred",
        "opensora/models/vae/wan.py",
        "        return (mode - mean) / std",
        "        return mode / std - mean",
        WAN_VAE + "every_channel_has_a_mean_and_a_deviation_of_its_own[wan]",
    ),
    Mutation(
        "latents of Wan are decoded with means before deviations",
        "opensora/models/vae/wan.py",
        "        z = (latents * std + mean).to(self._dtype)",
        "        z = ((latents + mean) * std).to(self._dtype)",
        WAN_VAE + "latents_and_pixels_are_those_of_diffusers[wan22-size1-dtype1-1e-06]",
    ),
    Mutation(
        "umT5's padding is kept",
        "opensora/models/text/umt5.py",
        "copied(torch.where(mask[..., None], found, 0.0).to(self._device))",
        "copied(found.to(self._device))",
        WAN_TEXT + "umt5_is_that_of_the_published_pipeline",
    ),
    Mutation(
        "the hidden state before the last of Llama",
        "opensora/models/text/weights.py",
        "SKIPPED = 2  # layers",
        "SKIPPED = 1  # layers",
        WAN_TEXT + "llava_and_clip_are_those_of_the_published_pipeline",
    ),
    Mutation(
        "the instruction is cut off a token too late",
        "opensora/models/text/llava_clip.py",
        "        mask = mask[:, CROP:].to(self._device)",
        "        mask = mask[:, CROP - 1 : -1].to(self._device)",
        WAN_TEXT + "llava_and_clip_are_those_of_the_published_pipeline",
    ),
    Mutation(
        "Llama's rotary frequencies are rounded as its weights",
        "opensora/models/text/weights.py",
        "setattr(owner, name, getattr(fresh, name).to(device))",
        "setattr(owner, name, getattr(fresh, name).to(device, torch.bfloat16))",
        WAN_TEXT + "the_last_layers_and_norm_are_not_loaded",
    ),
    Mutation(
        "CLIP's last layer is read of a picture",
        "opensora/models/text/weights.py",
        'CLIP_VISION, "encoder.layers", skipped=1)',
        'CLIP_VISION, "encoder.layers", skipped=0)',
        PICTURE + "tokens_are_the_hidden_states_before_the_last[squash]",
    ),
    Mutation(
        "a clip that does not know its first frame sees it",
        "opensora/conditioning/references.py",
        "    return torch.where(known[:, 0].flatten(1).any(1)[:, None, None], tokens, 0.0)",
        "    return tokens",
        PICTURE + "training_gives_tokens_of_first_frames_that_are_known",
    ),
    Mutation(
        "the picture stays where its frames are dropped",
        STEP,
        "        return shown(encoded.image_tokens, given & ~dropped.view(-1, 1, 1, 1))",
        "        return shown(encoded.image_tokens, given)",
        PICTURE + "tokens_go_where_the_reference_goes",
    ),
    Mutation(
        "tokens made ahead are of another sample",
        "opensora/datasets/loading/feature_store.py",
        "[row : row + 1] for name in (*self._names, *coded)}",
        '[row : row + 1] for name in self._names} | {n: shard.get_tensor(f"{batch}.{n}")[:1] for n in coded}',
        PICTURE + "tokens_made_ahead_are_those_of_training",
    ),
    Mutation(
        "a signal is lost while an object is finalized",
        "opensora/utils/signal_handler.py",
        "        timers[-1].start()",
        "        timers[-1].cancel()",
        "tests/unit/test_listen_early.py::test_a_signal_while_an_object_is_finalized_is_heard[SIGTERM-300000-1000]",
    ),
    Mutation(
        "a row of the page that moves loses the focus",
        f"{PAGE}/queue.js",
        'if (at("queue").contains(focused))',
        "if (false)",
        "tests/integration/test_service_page_access.py::test_a_row_that_moves_keeps_the_focus",
    ),
    Mutation(
        "weights of ZeRO 0 to 2 are counted as cut",
        "opensora/inference/check.py",
        'if parallel.zero == 3 else degrees["tensor"]',
        'if parallel.zero >= 0 else degrees["tensor"]',
        "tests/unit/test_two_experts_found.py::test_experts_take_turns_where_a_process_has_no_room_for_both[2-True]",
    ),
)


class Verdict(NamedTuple):
    """What a test said."""

    passed: bool
    by_assertion: bool  # it failed, and not because the program ended with an error
    message: str  # the first failure, on one line


class Stale(Exception):
    """A row whose text is not in its file exactly once."""


def edit(mutation: Mutation, root: Path) -> None:
    """Make the mistake in the project at ``root``.

    Raises:
        Stale: the text is not there, or more than once.
    """
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        raise Stale(f"{mutation.name}: {mutation.old!r} stands {count} times in {mutation.file}; mend this row")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


@contextmanager
def copied() -> Iterator[Path]:
    """The project in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        for part in COPIED:
            source, target = ROOT / part, Path(name) / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
            else:
                shutil.copy(source, target)
        yield Path(name)


def verdict(*tests: str, mutation: Mutation | None = None) -> Verdict:
    """What these tests say of the project with this mistake in it, one after the other until one fails.

    Raises:
        Stale: see ``edit``.
        RuntimeError: the test did not run.
    """
    with copied() as root:
        if mutation:
            edit(mutation, root)
        context = multiprocessing.get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_run_test, args=(root, tests, sending))
        process.start()
        sending.close()
        try:
            if not receiving.poll(LIMIT_S * len(tests)):
                raise RuntimeError(f"{tests[0]} did not end within {LIMIT_S * len(tests):g} s")
            return Verdict(*receiving.recv())
        except EOFError:
            raise RuntimeError(f"{tests[0]} died") from None
        finally:
            process.kill()
            process.join()


def _run_test(root: Path, tests: Sequence[str], sending: Any) -> None:
    """In a process of its own, whose modules and paths are those of the copy."""
    os.chdir(root)
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [str(root), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(root)
    import pytest

    output = open("output.txt", "w")  # noqa: SIM115  (as long as the process)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    judge = _Judge()
    code = pytest.main([*tests, "-q", "-x", "-p", "no:cacheprovider", f"--rootdir={root}"], plugins=[judge])
    output.flush()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not judge.calls:
        lines = Path("output.txt").read_text().splitlines()
        judge.verdict = Verdict(False, False, f"pytest ended with {code!r}: {' / '.join(lines[-3:])}")
    sending.send(tuple(judge.verdict))  # the class is another one here, if the module was imported anew


class _Judge:
    """Notes how the first failing test failed."""

    def __init__(self) -> None:
        self.calls = 0
        self.verdict = Verdict(True, False, "")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.calls += report.when == "call"

    def pytest_exception_interact(self, call: Any, report: Any) -> None:
        if self.verdict.passed:
            error = call.excinfo.value
            # What a group of processes says of a failed assertion in one of them counts as one.
            is_group = type(error).__name__ == "DistributedFailure"
            by_assertion = isinstance(error, AssertionError) and (not is_group or "AssertionError" in str(error))
            text = str(error).strip() or type(error).__name__
            line = text.splitlines()[-1 if is_group else 0]
            self.verdict = Verdict(False, by_assertion, line[:100])


def _warm_up() -> None:
    """Import what is slow and not ours: forked processes have it then."""
    import av  # noqa: F401
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers.models.byt5
    import transformers.models.t5.modeling_t5  # noqa: F401

    torch.set_num_threads(1)


def main(argv: Sequence[str]) -> int:
    """Returns 0 when every chosen mistake was found by an assertion, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; none: all")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    chosen = parser.parse_args(argv)
    rows = [row for row in TABLE if not chosen.names or any(part in row.name for part in chosen.names)]
    if chosen.list or not rows:
        print("\n".join(f"{row.name:<50} {row.file}" for row in rows) or f"no such mutation; there are {len(TABLE)}")
        return 0 if rows else 2
    _warm_up()
    without = verdict(*dict.fromkeys(row.test for row in rows))
    if not without.passed:
        print(f"a test fails without a mistake: {without.message}")
        return 1
    missed = [row.name for row in rows if not _found(row)]
    print(f"{len(rows) - len(missed)} of {len(rows)} mistakes found")
    return 1 if missed else 0


def _found(row: Mutation) -> bool:
    """Print a line about one row."""
    began = time.monotonic()
    try:
        found = verdict(row.test, mutation=row)
    except (Stale, RuntimeError) as error:
        found = Verdict(False, False, str(error))
    word = "SURVIVED" if found.passed else "killed" if found.by_assertion else "NO TEST"
    print(
        f"{row.name:<50} {word:<9}{time.monotonic() - began:5.1f} s  {row.test.split('/')[-1]}  {found.message}",
        flush=True,
    )
    return found.by_assertion


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
