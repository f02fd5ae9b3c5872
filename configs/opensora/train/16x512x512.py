# Open-Sora 1.0, training:
#   bash launch/torchrun.sh 8 scripts/diffusion/train.py configs/opensora/train/16x512x512.py --data-path clips.csv

# Clips
dataset = dict(
    type="VideoTextDataset",
    data_path=None,
    num_frames=16,
    frame_interval=3,
    image_size=(512, 512),
)
num_workers = 4

# Layout
dtype = "bf16"
grad_checkpoint = True
plugin = "zero2"
sp_size = 1

# Models
model = dict(
    type="STDiT-XL/2",
    space_scale=1.0,
    time_scale=1.0,
    from_pretrained=None,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=128,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=120,
    shardformer=True,
)
scheduler = dict(
    type="iddpm",
    timestep_respacing="",
)

# Optimizer
lr = 2e-5
grad_clip = 1.0
batch_size = 8

# Run
seed = 42
outputs = "outputs"
wandb = False
epochs = 1000
log_every = 10
ckpt_every = 500
load = None
