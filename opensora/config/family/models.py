"""What several keys of the Open-Sora family say together of models: their kinds, sizes, encoders and objective."""

from collections.abc import Mapping
from typing import Any

from opensora.config.family import keys as table
from opensora.config.family.masks import SHORT_MASKS
from opensora.config.family.translation import Translation, own_names
from opensora.config.schema import shown, suggestion
from opensora.models.families import MODEL_CONFIGS
from opensora.utils.respacing import DIFFUSION_STEPS

# What keys of an autoencoder are that a file leaves out or says None for, where our defaults are those of the published
# configurations and the family's code has others.
ABSENT: dict[str, dict[str, tuple[str, Any]]] = {
    "opensora_v1_3": {
        "vae.micro_batch_size": ("vae.micro_batch", None),
        "vae.micro_frame_size": ("vae.micro_frame_size", None),
        "vae.temporal_overlap": ("vae.temporal_overlap", False),
        "vae.normalization": ("vae.normalization", "none"),
    },
}
# What files of 1.0 cannot say: its code has no such types and keys.
LATER_TYPES = ("STDiT2-XL/2", "PixArt-1B/2", "PixArt-Sigma-XL/2", "PixArtSigma-XL/2", "iddpm-speed", "rflow")
LATER_KEYS = ("scheduler.cfg_channel", "bucket_config", "mask_ratios", "dataset.")


def is_second(t: Translation) -> bool:
    """Whether the file is of Open-Sora 2."""
    return t.get("model.type") == "flux" or any(key.startswith(("ae.", "t5.", "sampling_option.")) for key in t.given)


def version_of(t: Translation) -> str:
    """The release whose habits a file of 1.x has; training files of 1.1 have the names of 1.0 for kernels, too."""
    kind = str(t.get("model.type", ""))
    if t.get("vae.type") == "OpenSoraVAE_V1_3" or "model.kernel_size" in t.given:
        return "1.3"
    if kind.startswith("STDiT3") or t.get("vae.type") == "OpenSoraVAE_V1_2":
        return "1.2"
    later = kind in LATER_TYPES or t.get("scheduler.type") in LATER_TYPES
    later = later or any(key.startswith(LATER_KEYS) for key in t.given)
    return "1.0" if "model.enable_flashattn" in t.given and not later else "1.1"


def of_type(t: Translation, key: str, types: Mapping[str, Mapping[str, Any]], ours: str) -> Mapping[str, Any]:
    """What a type of theirs is here, put into the section ``ours``."""
    found = t.get(key)
    if not isinstance(found, str) or found not in types:
        raise t.fail(key, suggestion(str(found), types))
    for name, value in types[found].items():
        t.put(f"{ours}.{name}", value, key)
    return types[found]


def models(t: Translation) -> None:
    """Denoiser, autoencoder, text encoder, objective: first their kinds, then what depends on several."""
    kind = str(t.get("model.type", ""))
    if kind in table.AUTOENCODERS or kind.startswith("VideoAutoencoder"):
        raise t.fail("model.type", "trains or tests an autoencoder, for which there is no command here")
    if t.is_file and t.get("model.type") is None:
        raise t.fail("model.type", "missing; a configuration of the family has model = dict(type=...)")
    if t.get("model.type") is not None:
        of_type(t, "model.type", table.MODELS, "model")
    complete(t)
    for section in ("vae", "ae"):
        if t.get(f"{section}.type") is not None:
            of_type(t, f"{section}.type", table.AUTOENCODERS, "vae")
    weights(t)
    autoencoder(t)
    text(t)
    objective(t)
    kernels(t)
    masks(t)
    if t.is_file:
        shapes(t)


def complete(t: Translation) -> None:
    """That a file of 1.x has its parts, for which the defaults here would be those of Open-Sora 2; and of these that a
    training run has its autoencoder, for which there is no default.

    Raises:
        UserError: one is missing, or has no type.
    """
    examples = {"vae": "VideoAutoencoderKL", "text_encoder": "t5", "scheduler": "iddpm"}
    if is_second(t):
        examples = {"ae": "hunyuan_vae"} if t.is_training and t.get("vae.type") is None else {}
    if not t.is_file:
        return
    for section, example in examples.items():
        if t.get(f"{section}.type") is None:
            needs = f"model.type={shown(t.get('model.type'))} needs {section} = dict(type=...), as type='{example}'"
            raise t.fail(f"{section}.type", f"missing; {needs}")


def weights(t: Translation) -> None:
    """model.from_pretrained is what is sampled, or what training starts from; adapters are beside it."""
    path = table.path_of(t.get("model.from_pretrained"))
    if t.get("start_from_scratch") and t.is_training:
        path = None
    if path is not None:
        t.put("train.init_from" if t.is_training else "weights", path, "model.from_pretrained")
    elif t.is_file and not t.is_training:
        raise t.fail("model.from_pretrained", "is None; say what to sample, as --ckpt-path FILE")
    load = t.get("load")
    if load is not None and t.is_training:
        t.put("train.resume", load, "load")
    key, adapters = t.first("ckpt_path_lora", "load_lora")
    if adapters is not None and t.is_training:
        raise t.fail(key, "is for sampling; a run with lora.rank > 0 trains adapters, and goes on by --load RUN")
    if adapters is not None:
        t.put("lora", table.path_of(adapters), key)


def autoencoder(t: Translation) -> None:
    path, folder = table.path_of(t.get("vae.from_pretrained")), t.get("vae.subfolder")
    if path is not None:
        t.put("vae.path", f"{path}/{folder}" if folder else path, "vae.from_pretrained")
    kind = t.layer.get("vae", {}).get("kind")
    for key, (target, value) in ABSENT.get(kind, {}).items():
        if t.get(key) is None:
            t.put(target, value, "vae.type")
    if kind == "opensora_v1_2" and t.given.get("vae.micro_frame_size", 17) is None:  # while one that is absent is 17
        t.put("vae.micro_frame_size", None, "vae.micro_frame_size")


def text(t: Translation) -> None:
    length_key, length = t.first("text_encoder.model_max_length", "model_max_length")
    if t.get("text_encoder.type") is not None:
        kind = of_type(t, "text_encoder.type", table.TEXT_ENCODERS, "text")["kind"]
        if kind == "t5" and (length := _read_by_model(t) if length is None else length) is not None:
            t.put("text.max_tokens", length, length_key)
        elif kind == "clip" and length not in (None, 77):
            raise t.fail(length_key, "must be 77, the tokens that CLIP reads")
        path = table.path_of(t.get("text_encoder.from_pretrained"))
        if path is not None and kind != "classes":
            t.put(f"text.{kind}_path", path, "text_encoder.from_pretrained")
        if kind == "t5" and version_of(t) == "1.0":
            t.put("text.clean", "always", "text_encoder.type")  # captions of training, too
    if is_second(t) and ("t5.from_pretrained" in t.given or "clip.from_pretrained" in t.given):
        t.put(
            "text.kind", "t5_clip", "t5.from_pretrained" if "t5.from_pretrained" in t.given else "clip.from_pretrained"
        )
    if t.get("clip.max_length", 77) != 77:
        raise t.fail("clip.max_length", "must be 77, the tokens that CLIP reads")
    for section in ("text_encoder", "t5"):
        if t.get(f"{section}.shardformer"):
            t.put("text.shard", True, f"{section}.shardformer")


def _read_by_model(t: Translation) -> int | None:
    """Tokens of a prompt that the model is built for: as the file says, or its kind has; None: it says nothing."""
    fields = own_names(MODEL_CONFIGS[kind]) if (kind := t.layer.get("model", {}).get("kind")) in MODEL_CONFIGS else {}
    if not t.is_file or is_second(t) or "model_max_length" not in fields:
        return None
    return t.get("model.model_max_length", fields["model_max_length"].default)


def objective(t: Translation) -> None:
    """The scheduler: what is learned, and how it is stepped."""
    if t.get("scheduler.type") is None:
        return
    kind = of_type(t, "scheduler.type", table.OBJECTIVES, "objective")["kind"]
    if t.is_training and t.given["scheduler.type"] == "dpm-solver":
        raise t.fail("scheduler.type", "samples only; the models that it samples are trained with iddpm")
    version = version_of(t)
    if kind == "rectified_flow_v1":
        t.put("objective.version", "1.3" if version == "1.3" else "1.2", "scheduler.type")
    elif kind == "iddpm":
        t.put("objective.tables", "fp64" if version == "1.0" else "fp32", "scheduler.type")
    if not t.is_training:
        t.put("sampling.solver", table.SOLVERS[t.given["scheduler.type"]], "scheduler.type")
        if version == "1.0" and t.given["scheduler.type"] == "iddpm" and "scheduler.cfg_channel" not in t.given:
            t.put("sampling.cfg_channel", 3, "scheduler.type")
        if t.given["scheduler.type"] == "iddpm-speed":
            t.note("scheduler.type", "is for training; sampled as by iddpm")
        steps(t, t.given["scheduler.type"])
    elif t.is_file and t.has(("train", "loss_reduction")):
        t.put("train.loss_reduction", "samples", "scheduler.type")


def steps(t: Translation, name: str) -> None:
    """Steps and guidance of a sampling file of 1.x that leaves them out: those of its scheduler."""
    if not t.is_file or is_second(t):
        return
    if t.first("scheduler.cfg_scale", "guidance")[1] is None:
        t.put("sampling.guidance", 4.0, "scheduler.type")
    key, count = t.first("num_steps", "scheduler.num_sampling_steps")
    chosen = t.get("scheduler.timestep_respacing") if name.startswith("iddpm") else None
    if count is not None and chosen:
        raise t.fail("scheduler.timestep_respacing", f"{key} says otherwise; keep one")
    if count is not None:
        return
    if name == "dpm-solver":
        raise t.fail(key, "missing; type='dpm-solver' has no number of its own, say one, as --num-sampling-steps 20")
    if chosen:
        t.put("sampling.timestep_respacing", chosen, "scheduler.timestep_respacing")
    else:  # of iddpm all that are trained
        whole = t.get("scheduler.diffusion_steps", DIFFUSION_STEPS)
        t.put("sampling.num_steps", 10 if name == "rflow" else whole, "scheduler.type")


def kernels(t: Translation) -> None:
    key, flash = t.first("model.enable_flash_attn", "model.enable_flashattn")
    if flash is not None:
        t.put("parallel.attention", "auto" if flash else "math", key)
    key = "model.enable_layernorm_kernel"
    if t.get(key) is not None:
        t.put("parallel.norm_kernel", "auto" if t.given[key] else "torch", key)
    if t.is_file and t.is_training and not is_second(t):  # whose HybridAdam is a fused one, too
        t.put("optim.kernel", "auto", "optim.cls" if "optim.cls" in t.given else "lr")
    if "model.use_liger_rope" in t.given:
        t.put("model.rope_layout", "half" if t.given["model.use_liger_rope"] else "interleaved", "model.use_liger_rope")


def masks(t: Translation) -> None:
    """Strategies by names that one of the family's files has, and its own code refuses."""
    given = t.get("mask_ratios")
    names = [str(name) for name in given] if isinstance(given, Mapping) and t.is_training else []
    short = {name: SHORT_MASKS.get(name.removeprefix("mask_")) for name in names}
    read = [f"{name} as {whole}" for name, whole in short.items() if whole is not None]
    if read:
        t.note("mask_ratios", f"{', '.join(read)}: the family's code knows no such names")


def shapes(t: Translation) -> None:
    """What the family's code takes from other models, or from defaults of its own, when it builds the denoiser."""
    kind = t.layer["model"]["kind"]
    fields = own_names(MODEL_CONFIGS[kind]) if kind in MODEL_CONFIGS else None
    for name, value in table.DEFAULTS.get(kind, {}).items():
        t.default(f"model.{name}", value, "model.type")
    if not is_second(t):
        channels = table.LATENT_CHANNELS.get(t.layer.get("vae", {}).get("kind"), 4)
        t.default("model.in_channels", channels, "model.type")
        length_key, length = t.first("text_encoder.model_max_length", "model_max_length")
        if length is not None and t.get("text_encoder.type", "t5") == "t5" and _may(fields, "model_max_length"):
            t.default("model.model_max_length", length, length_key)
            if t.get("model.model_max_length", length) != length:
                cut = f"its null text is cut, or its last row repeated, to the {length} tokens of prompts"
                t.note("model.model_max_length", cut)
        if version_of(t) == "1.3" and kind == "stdit3":
            t.default("model.cond_embed", True, "model.type")
    key = "model.no_temporal_pos_emb"
    if t.get(key) is not None and _may(fields, "no_temporal_pos_emb") and not kind.startswith("stdit"):
        t.put(key, t.given[key], key)
    elif t.get(key):
        t.note(key, "STDiT always knows the frame, in the family's code too")
    if kind.startswith("pixart"):
        _made_for(t)
    if t.is_training and not is_second(t):
        dropped = t.get("model.class_dropout_prob", 0.1)
        for part in ("text", "pooled"):
            t.put(f"conditioning.dropout.{part}", dropped, "model.class_dropout_prob")
    elif t.get("model.class_dropout_prob"):
        t.note("model.class_dropout_prob", "is for training")


def _may(fields: Mapping[str, Any] | None, name: str) -> bool:
    return fields is None or name in fields


def _made_for(t: Translation) -> None:
    """PixArt stretches positions to the grid that it is built for, which is that of the configured clips."""
    key, size = t.first("image_size", "dataset.image_size")
    _, frames = t.first("num_frames", "dataset.num_frames")
    whole = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)
    if whole and isinstance(frames, int) and t.layer.get("vae", {}).get("kind") == "sd":
        t.default("model.input_size", [frames, *(side // 8 for side in size)], key)


def stills(t: Translation) -> None:
    """Text to image to video: a model of stills before that of clips."""
    if not t.get("use_t2i2v"):
        return
    flux, ae = t.get("img_flux", {}), t.get("img_flux_ae", {})
    if not isinstance(flux, Mapping) or not isinstance(flux.get("from_pretrained"), str):
        raise t.fail("img_flux", "must be dict(type='flux', from_pretrained=FILE, ...)")
    t.put("still.weights", table.path_of(flux["from_pretrained"]), "img_flux")
    kind, layout = table.MODELS["flux"]["kind"], "half" if flux.get("use_liger_rope") else "interleaved"
    fields = own_names(MODEL_CONFIGS[kind])
    t.put("still.model", {"kind": kind, **table.DEFAULTS[kind], "rope_layout": layout}, "img_flux")
    for name, value in flux.items():
        if name in fields:
            t.layer["still"]["model"][name] = value
        elif name not in ("type", "from_pretrained", "use_liger_rope", "strict_load", "grad_ckpt_settings"):
            raise t.fail("img_flux", f"{name} is unknown; {suggestion(str(name), fields)}")
    for name, value in ae.items() if isinstance(ae, Mapping) else ():
        if name not in ("type", "from_pretrained", "resolution") and table.STILL_AUTOENCODER.get(name) != value:
            raise t.fail("img_flux_ae", f"{name} must be {shown(table.STILL_AUTOENCODER.get(name))}, as published")
    if isinstance(ae, Mapping) and ae.get("from_pretrained"):
        t.put("still.vae", {"kind": "flux2d", "path": table.path_of(ae["from_pretrained"])}, "img_flux_ae")
    if t.get("img_resolution"):
        t.put("still.resolution", t.get("img_resolution"), "img_resolution")
