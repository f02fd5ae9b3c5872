# Open-Sora 1.0, sampling:
#   bash launch/torchrun.sh 8 scripts/diffusion/inference.py configs/opensora/inference/16x512x512-rflow.py

# Clips
num_frames = 16
fps = 24 // 3
image_size = (512, 512)

# Models
model = dict(
    type="STDiT-XL/2",
    space_scale=1.0,
    time_scale=1.0,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
    from_pretrained="PRETRAINED_MODEL",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=2,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=120,
)
scheduler = dict(
    type="rflow",
    num_sampling_steps=10,
    cfg_scale=7.0,
)

# Run
dtype = "bf16"
batch_size = 2
seed = 42
prompt_path = "./assets/texts/t2v_samples.txt"
save_dir = "./outputs/samples/"
