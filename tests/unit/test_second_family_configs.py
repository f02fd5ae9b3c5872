"""Files as Open-Sora 2 has them are our configurations of the same use; flags of the family's commands."""

from pathlib import Path

import pytest
import yaml

from opensora.config.compare import differences
from opensora.config.load import is_training, load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.config.schema import plain
from opensora.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

MODEL = """
    in_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=[16, 56, 56],
    theta=10_000,
    qkv_bias=True,
"""
HUNYUAN = """
ae = dict(
    type="hunyuan_vae",
    from_pretrained="./ckpts/hunyuan_vae.safetensors",
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    latent_channels=16,
    use_spatial_tiling=True,
    use_temporal_tiling=False,
)
"""
ENCODERS = """
t5 = dict(type="text_embedder", from_pretrained="./ckpts/google/t5-v1_1-xxl", max_length=512, shardformer=True)
clip = dict(type="text_embedder", from_pretrained="./ckpts/openai/clip-vit-large-patch14", max_length=77)
"""
VIDEO_AE = """
ae = dict(
    _delete_=True,
    type="dc_ae",
    from_scratch=True,
    model_name="dc-ae-f32t4c128",
    from_pretrained="./ckpts/F32T4C128_AE.safetensors",
    use_spatial_tiling=True,
    use_temporal_tiling=True,
    spatial_tile_size=256,
    temporal_tile_size=32,
    tile_overlap_factor=0.25,
)
ae_spatial_compression = 32
"""
FILES = {
    "diffusion/inference/256px.py": f"""
save_dir = "samples"
seed = 42
batch_size = 1
dtype = "bf16"
cond_type = "t2v"
dataset = dict(type="text")
sampling_option = dict(
    resolution="256px",
    aspect_ratio="16:9",
    num_frames=129,
    num_steps=50,
    shift=True,
    temporal_reduction=4,
    is_causal_vae=True,
    guidance=7.5,
    guidance_img=3.0,
    text_osci=True,
    image_osci=True,
    scale_temporal_osci=True,
    method="i2v",
    seed=None,
)
motion_score = "4"
fps_save = 24
model = dict(
    type="flux",
    from_pretrained="./ckpts/Open_Sora_v2.safetensors",
    guidance_embed=False,
    fused_qkv=False,
    use_liger_rope=True,
    cond_embed=True,{MODEL}
)
{HUNYUAN}{ENCODERS}
""",
    "diffusion/inference/plugins/sp.py": """
plugin = "hybrid"
plugin_config = dict(tp_size=1, pp_size=1, sp_size=8, sequence_parallelism_mode="ring_attn", zero_stage=2)
plugin_ae = "hybrid"
plugin_config_ae = dict(tp_size=8, pp_size=1, sp_size=1, zero_stage=2)
""",
    "diffusion/inference/plugins/t2i2v.py": f"""
use_t2i2v = True
img_flux = dict(
    type="flux",
    from_pretrained="./ckpts/flux1-dev.safetensors",
    guidance_embed=True,
    cond_embed=False,{MODEL}
)
img_flux_ae = dict(
    type="autoencoder_2d",
    from_pretrained="./ckpts/ae.safetensors",
    resolution=256,
    in_channels=3,
    ch=128,
    out_ch=3,
    ch_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    z_channels=16,
    scale_factor=0.3611,
    shift_factor=0.1159,
)
img_resolution = "768px"
""",
    "diffusion/inference/768px.py": """
_base_ = ["256px.py", "plugins/sp.py"]
sampling_option = dict(resolution="768px")
""",
    "diffusion/inference/t2i2v_256px.py": '_base_ = ["256px.py", "plugins/t2i2v.py"]\n',
    "diffusion/inference/t2i2v_768px.py": '_base_ = ["768px.py", "plugins/t2i2v.py"]\n',
    "diffusion/inference/high_compression.py": f"""
_base_ = ["t2i2v_768px.py"]
plugin = None
plugin_config = None
plugin_ae = None
plugin_config_ae = None
patch_size = 1
model = dict(
    from_pretrained="./ckpts/Open_Sora_v2_Video_DC_AE.safetensors", in_channels=128, cond_embed=True, patch_size=1
)
{VIDEO_AE}
sampling_option = dict(num_frames=128)
""",
    "diffusion/train/image.py": f"""
dataset = dict(type="video_text", transform_name="resize_crop", fps_max=24, vmaf=True)
grad_ckpt_settings = (8, 100)
bucket_config = {{
    "256px": {{1: (1.0, 45)}},
    "768px": {{1: (0.5, 13)}},
    "1024px": {{1: (0.5, 7)}},
}}
model = dict(
    type="flux",
    from_pretrained=None,
    strict_load=False,
    guidance_embed=False,
    fused_qkv=False,
    use_liger_rope=True,
    grad_ckpt_settings=grad_ckpt_settings,{MODEL}
)
dropout_ratio = {{"t5": 0.31622777, "clip": 0.31622777}}
{HUNYUAN}{ENCODERS}
is_causal_vae = True
lr = 1e-5
eps = 1e-15
optim = dict(cls="HybridAdam", lr=lr, eps=eps, weight_decay=0.0, adamw_mode=True)
warmup_steps = 0
update_warmup_steps = True
grad_clip = 1.0
accumulation_steps = 1
ema_decay = None
prefetch_factor = 2
num_workers = 12
num_bucket_build_workers = 64
dtype = "bf16"
plugin = "zero2"
grad_checkpoint = True
plugin_config = dict(reduce_bucket_size_in_m=128, overlap_allgather=False)
pin_memory_cache_pre_alloc_numels = [(260 + 20) * 1024 * 1024] * 24 + [(34 + 20) * 1024 * 1024] * 4
async_io = False
seed = 42
outputs = "outputs"
epochs = 1000
log_every = 10
ckpt_every = 100
keep_n_latest = 20
wandb_project = "mmdit"
save_master_weights = True
load_master_weights = True
""",
    "diffusion/train/stage1.py": """
_base_ = ["image.py"]
dataset = dict(memory_efficient=False)
bucket_config = BUCKETS
lr = 5e-5
optim = dict(lr=lr)
ema_decay = 0.999
ckpt_every = 2000
""",
    "diffusion/train/stage1_i2v.py": """
_base_ = ["stage1.py"]
model = dict(cond_embed=True)
condition_config = dict(t2v=1, i2v_head=5, i2v_loop=1, i2v_tail=1)
lr = 1e-5
optim = dict(lr=lr)
""",
    "diffusion/train/stage2.py": """
_base_ = ["image.py"]
grad_ckpt_settings = (100, 100)
plugin = "hybrid"
plugin_config = dict(
    tp_size=1,
    pp_size=1,
    sp_size=4,
    sequence_parallelism_mode="ring_attn",
    enable_sequence_parallelism=True,
    static_graph=True,
    zero_stage=2,
)
bucket_config = BUCKETS
model = dict(grad_ckpt_settings=grad_ckpt_settings)
lr = 5e-5
optim = dict(lr=lr)
ema_decay = 0.99
""",
    "diffusion/train/high_compression.py": f"""
_base_ = ["image.py"]
bucket_config = BUCKETS
condition_config = dict(t2v=1, i2v_head=5, i2v_loop=1, i2v_tail=1)
patch_size = 1
model = dict(from_pretrained=None, in_channels=128, cond_embed=True, patch_size=patch_size)
{VIDEO_AE.replace("from_scratch", "scaling_factor=0.493, from_scratch")}
is_causal_vae = False
ckpt_every = 250
lr = 3e-5
optim = dict(lr=lr)
""",
}


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second") / "configs"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.replace("BUCKETS", buckets_of(Path(name).stem)))
    return folder


def buckets_of(stage: str) -> str:
    """Our table of a stage, as the family writes it."""
    if not (file := CONFIGS / "data" / f"{stage}.yaml").is_file():
        return ""
    table = yaml.safe_load(file.read_text())["data"]["buckets"]
    rows = {name: {n: tuple(row) for n, row in lengths.items()} for name, lengths in table.items()}
    return repr({"_delete_": True, **rows})


@pytest.mark.parametrize("name", ["256px", "768px", "t2i2v_256px", "t2i2v_768px", "high_compression"])
def test_sampling_is_ours_of_the_same_use(name: str, second: Path) -> None:
    path, prompt = second / f"diffusion/inference/{name}.py", ["--prompt", "a cat"]
    theirs, ours = (
        load_config(SampleConfig, path, prompt),
        load_config(SampleConfig, CONFIGS / f"sample/{name}.yaml", prompt),
    )
    assert not is_training(SampleConfig, path)
    found = differences(plain(ours), plain(theirs))
    assert found == ["prompt=None (was a cat)", "prompts=['a cat'] (was [])"]


# What our configurations of the stages have otherwise: names, tables, lengths, layouts and weights that are ours to
# choose, and what the family's files do not say.
CHOSEN = (
    *("name", "data.table", "data.micro_batches", "data.workers", "parallel", "train", "log", "optim.ema_decay"),
    *("optim.ema_warmup", "optim.warmup_steps", "optim.initial_lr", "model.fused_qkv", "model.rope_layout"),
)


@pytest.mark.parametrize("name", ["image", "stage1", "stage1_i2v", "stage2", "high_compression"])
def test_training_is_ours_of_the_same_use(name: str, second: Path) -> None:
    path = second / f"diffusion/train/{name}.py"
    theirs = load_config(RunConfig, path, ["--data-path", "clips.parquet"])
    ours = load_config(RunConfig, CONFIGS / f"train/{name}.yaml")
    assert is_training(RunConfig, path)
    found = [line for line in differences(plain(ours), plain(theirs)) if not line.startswith(CHOSEN)]
    expected = {
        "image": ["model.cond_embed=False (was True)"],
        "stage1": ["model.cond_embed=False (was True)"],
        "stage2": ["model.cond_embed=False (was True)"],
        "high_compression": ["optim.lr=3e-05 (was 1e-05)"],
    }
    assert found == expected.get(name, [])
    assert theirs.name == f"diffusion-{name}" and theirs.data.table == "clips.parquet"
    assert theirs.parallel.recompute.kind == "full" and theirs.parallel.zero == 2
    assert theirs.parallel.mesh.ring == (4 if name == "stage2" else 1)
    assert theirs.model.rope_layout == "half" and not theirs.model.fused_qkv
    assert theirs.optim.ema_decay == {"stage1": 0.999, "stage1_i2v": 0.999, "stage2": 0.99}.get(name, 0.0)
    assert theirs.train.checkpoint_keep == 20 and not theirs.train.checkpoint_async and theirs.data.workers == 12


def test_aliases_and_overrides(second: Path) -> None:
    """As in the family's scripts: names win over the same names in a section, by hyphens or underscores."""
    cfg = load_config(
        SampleConfig,
        second / "diffusion/inference/256px.py",
        [
            *(
                "--resolution",
                "768px",
                "--num-frames",
                "33",
                "--num_steps=7",
                "--guidance",
                "3",
                "--aspect_ratio",
                "1:1",
            ),
            *("--sampling_option.seed", "5", "--save-dir", "out", "--ckpt-path", "other.safetensors", "--seed", "9"),
            *("--prompt", "a cat", "--motion-score", "dynamic", "--offload_model", "True", "--cond_type", "i2v_head"),
            *("--ref", "a.png", "num_sample=2", "sampling.fps=12", "--sampling.shift", "false", "text.shard=false"),
        ],
    )
    assert (cfg.sampling.resolution, cfg.sampling.num_frames, cfg.sampling.num_steps) == ("768px", 33, 7)
    assert (cfg.sampling.guidance, cfg.sampling.aspect_ratio, cfg.sampling.seed) == (3.0, "1:1", 5)
    assert (cfg.save_dir, cfg.weights, cfg.prompts, cfg.offload) == ("out", "other.safetensors", ("a cat",), "models")
    assert cfg.refine.motion_score and cfg.cond_type == "i2v_head" and cfg.ref == "a.png" and cfg.num_sample == 2
    assert cfg.sampling.fps == 12 and not cfg.sampling.shift and cfg.text is not None and not plain(cfg.text)["shard"]


REFUSED: dict[str, tuple[str, list[str], str]] = {
    # name -> (what is changed in 256px.py, words, the message)
    "unknown key": ("typo_key = 1", [], "typo_key=1: unknown key; "),
    "suggestion": ("prompt_pth = 'a'", [], "unknown key; did you mean prompt_path?"),
    "unknown key of the model": ("model = dict(hidden_sise=3)", [], "unknown key; did you mean hidden_size?"),
    "unknown key of a section": ("ae = dict(use_spatial_tilling=True)", [], "did you mean use_spatial_tiling?"),
    "unknown type": ("model = dict(type='fluks')", [], "model.type='fluks': did you mean flux? ("),
    "autoencoder": ("model = dict(type='hunyuan_vae')", [], "trains or tests an autoencoder"),
    "no section": ("model = dict(_delete_=True)", [], "model.type: missing"),
    "a section that is none": ("model = 3", [], "model=3: must be a mapping"),
    "no weights": ("model = dict(from_pretrained=None)", [], "say what to sample, as --ckpt-path FILE"),
    "value of ours": ("sampling_option = dict(num_steps=0)", [], "sampling.num_steps=0: must be an integer >= 1 ("),
    "type of ours": ("sampling_option = dict(num_steps='x')", [], "as sampling_option.num_steps)"),
    "clip": ("clip = dict(max_length=32)", [], "clip.max_length=32: must be 77"),
    "placeholder": ("prompt = ['TEXT']", [], "prompt=['TEXT']: stands for a prompt of yours"),
    "two of one": ("scheduler = dict(cfg_scale=3.0)", [], "says otherwise; keep one"),
    "value missing": ("", ["--ckpt-path"], "--ckpt-path: a value is missing"),
    "one side": ("", ["--image-size", "240"], "image_size=240: must be two numbers"),
    "frames": ("", ["--num-frames", "three"], "must be "),
    "no flag": ("", ["--num-framez", "3"], "num_framez: unknown key"),
    "training": (
        "lr = 1\noptim = dict(lr=1)\nepochs = 1\noutputs = 'x'\ndata_path = 'x'\nbucket_config = {}",
        [],
        "training",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, second: Path) -> None:
    change, words, expected = REFUSED[name]
    path = second / "diffusion/inference/changed.py"
    path.write_text(f"_base_ = '256px.py'\n{change}\n" if "model = 3" not in change else f"{change}\nsave_dir = 'x'\n")
    with pytest.raises(UserError) as caught:
        load_config(SampleConfig, path, [*words, *([] if "prompt" in change else ["--prompt", "a cat"])])
    assert expected in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_has_no_meaning_is_said_once(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = second / "diffusion/inference/said.py"
    path.write_text("_base_ = '256px.py'\nverbose = 2\n")
    for _ in range(2):
        load_config(SampleConfig, path, ["--prompt", "a cat"])
    printed = capsys.readouterr().err
    assert printed.count(f"verbose ({path}:2): has no meaning here: progress is always shown") == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("plugin_config = dict(sp_sise=2)", "sp_sise is unknown; did you mean sp_size?"),
        ("plugin_config = dict(pp_size=2)", "pp_size must be 1"),
        ("plugin = 'zero9'", "plugin='zero9': did you mean zero3?"),
        ("bucket_config = {'256px': {1: 3}}", "must be (probability, batch size)"),
        ("bucket_config = {'_delete_': True}", "data.buckets: missing"),
        ("dataset = dict(fps_max=30)", "dataset.fps_max=30: must be 24"),
        ("mask_ratios = {'head': 0.1, 'mask_quarter_head': 0.2}", "names a strategy twice; keep one"),
        ("mask_types = [1]", "mask_types=[1]: must be {kind: weight}"),
        ("optim = dict(cls='Lion')", "optim.cls='Lion': must be HybridAdam or AdamW"),
        ("save_dir = prompt = 1", "one name is assigned at a time"),
        ("ae = dict(latent_channels=32)", "ae.latent_channels=32: must be 16, which is the only one here"),
    ],
)
def test_what_is_refused_in_training(change: str, expected: str, second: Path) -> None:
    path = second / "diffusion/train/changed.py"
    path.write_text(f"_base_ = 'image.py'\n{change}\n")
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, path, ["--data-path", "clips.csv"])
    assert expected in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_an_autoencoder_of_stills_that_is_not_the_published_one(second: Path) -> None:
    path = second / "diffusion/inference/other_still.py"
    path.write_text("_base_ = 't2i2v_256px.py'\nimg_flux_ae = dict(z_channels=4)\n")
    with pytest.raises(UserError, match="z_channels must be 16, as published"):
        load_config(SampleConfig, path, ["--prompt", "a cat"])


def test_a_key_that_is_a_number(second: Path) -> None:
    path = second / "diffusion/inference/other_still.py"
    path.write_text("_base_ = 't2i2v_256px.py'\nimg_flux = {7: 1}\n")
    with pytest.raises(UserError, match=r"img_flux=.*: 7 is unknown"):
        load_config(SampleConfig, path, ["--prompt", "a cat"])
