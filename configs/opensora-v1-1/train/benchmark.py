# Open-Sora 1.1, training:
#   bash launch/torchrun.sh 8 scripts/diffusion/train.py configs/opensora-v1-1/train/benchmark.py --data-path clips.csv

# Clips
dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,
    num_frames=None,
    frame_interval=3,
    image_size=(None, None),
    transform_name="resize_crop",
)
bucket_config = {  # resolution: {frames: (probability to take a clip that fits, batch size)}
    "720p": {1: (20, 40), 32: (0.5, (2, 4)), 64: (0.5, (1, 1))},
}
num_workers = 4
num_bucket_build_workers = 16

# Layout
dtype = "bf16"
grad_checkpoint = True
plugin = "zero2"
sp_size = 1

# Models
model = dict(
    type="STDiT2-XL/2",
    from_pretrained=None,
    input_sq_size=512,
    qk_norm=True,
    qk_norm_legacy=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=4,
    local_files_only=True,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=200,
    shardformer=True,
    local_files_only=True,
)
scheduler = dict(
    type="iddpm",
    timestep_respacing="",
)

# Optimizer
lr = 2e-5
grad_clip = 1.0
batch_size = None

# Run
seed = 42
outputs = "outputs"
wandb = False
epochs = 1000
log_every = 10
ckpt_every = 1000
load = None
