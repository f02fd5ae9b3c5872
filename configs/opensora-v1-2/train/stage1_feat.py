# Open-Sora 1.2, training:
#   bash launch/torchrun.sh 8 scripts/diffusion/train.py
#     configs/opensora-v1-2/train/stage1_feat.py --data-path clips.csv

# Clips
dataset = dict(
    type="BatchFeatureDataset",
)
mask_ratios = {
    "random": 0.2,
    "intepolate": 0.01,
    "quarter_random": 0.01,
    "quarter_head": 0.01,
    "quarter_tail": 0.01,
    "quarter_head_tail": 0.01,
    "image_random": 0.05,
    "image_head": 0.1,
    "image_tail": 0.05,
    "image_head_tail": 0.05,
}
num_workers = 4
load_video_features = True
load_text_features = True

# Layout
dtype = "bf16"
grad_checkpoint = True
plugin = "zero2"

# Models
model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,
    qk_norm=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
    freeze_y_embedder=True,
    skip_y_embedder=True,
)
vae_out_channels = 4
model_max_length = 300
text_encoder_output_dim = 4096
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    sample_method="logit-normal",
)

# Optimizer
lr = 2e-4
grad_clip = 1.0
adam_eps = 1e-15
ema_decay = 0.99

# Run
seed = 42
outputs = "outputs"
wandb = False
epochs = 1000
log_every = 10
ckpt_every = 500
load = None
